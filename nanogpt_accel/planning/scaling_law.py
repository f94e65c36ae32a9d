"""Fit a scaling law to the losses of finished runs, and predict the loss of a larger run with its uncertainty.

    L(N, D) = E + A / N^a + B / D^b    N: parameters in matrix products, D: training tokens, L: nats per token
    L(C)    = E + K / C^c              C: FLOPs, for runs with N and D on a line, such as constant tokens per parameter

E is the loss that no model can go below: the entropy of the text. The first form is from Hoffmann et al. 2022
("Chinchilla", arXiv 2203.15556). As in this paper, the fit minimizes a Huber loss on the differences between the
logarithms of measured and predicted losses. Besiroglu et al. 2024 (arXiv 2404.10102) found two errors in the published
fit: the optimizer stopped too early, because the Huber losses of the runs were averaged and not summed, and the
intervals were too narrow. Here, fits from many starting points run until they converge.

The intervals are from a parametric bootstrap: new losses are drawn from the fitted law with noise, and the law is
fitted to them again. The standard deviation of the noise is estimated from the residuals with n - p degrees of freedom,
for n runs and p constants. Because a few runs determine it only roughly, each refit draws another standard deviation,
as in Student's t interval. Otherwise, 90% intervals from 5 to 12 runs would contain the true value in only 75 to 85% of
cases. The interval of a prediction also includes the noise of the new run.
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# approach 3 of Hoffmann et al. 2022, with the constants of Besiroglu et al. 2024
CHINCHILLA = {"E": 1.8172, "A": 482.01, "a": 0.3478, "B": 2085.43, "b": 0.3658}
FORMS = {"L(N, D)": (("A", "a", "n_params"), ("B", "b", "tokens")), "L(C)": (("K", "c", "flops"),)}
DELTA = 1e-3  # threshold of the Huber loss: larger differences of logarithms count linearly, so bad runs weigh less
EXPONENTS = 0.01, 2.0  # lower and upper bound of the exponents
# Number of refits in the bootstrap, and the percentiles of a 90% interval. With the percentiles 5 and 95, the intervals
# of synthetic laws contain the true value in only 88 to 93% of cases; with 4 and 96, in at least 90%.
N_DRAWS, INTERVAL = 1000, (4, 96)
SAME_FLOPS = 1.25  # runs whose compute differs by at most this factor are on one isoFLOP curve
ON_A_LINE = 0.2  # below this `spread` (see _line), the runs are considered to be on one line in (log N, log D)


class Run(NamedTuple):
    """A finished run: a point of the fit."""

    name: str
    n_params: int  # in matrix products
    tokens: int
    flops: float
    loss: float  # in nats per token


@dataclass(frozen=True)
class Law:
    """A fitted law.

    form: a key of FORMS. reason: why this form was fitted, as text.
    constants: {name: value}. draws: {name: array of the values in the refits}. at_bound: names of constants whose
    fitted value is a bound of the fit; the runs do not determine these constants. noise: standard deviation of the
    residuals log(loss) - log(predicted loss). noise_draws: one random residual per refit; `predict` adds it to the
    log(loss) of a new run.
    """

    runs: tuple
    form: str
    reason: str
    constants: dict
    draws: dict
    at_bound: tuple
    noise: float
    noise_draws: np.ndarray

    @property
    def formula(self):
        """The law with its constants as text: L = 1.82 + 482 / N^0.348 + 2.09e+03 / D^0.366."""
        letters = {"n_params": "N", "tokens": "D", "flops": "C"}
        terms = [f"{self.constants[A]:.4g} / {letters[x]}^{self.constants[a]:.3g}" for A, a, x in FORMS[self.form]]
        return " + ".join([f"L = {self.constants['E']:.4g}", *terms])

    def interval(self, name):
        """Return the 90% interval of a constant: (low, high)."""
        return tuple(np.percentile(self.draws[name], INTERVAL))

    def predict(self, n_params, tokens, flops):
        """Return (loss, low, high) of new runs: the expected loss, and the 90% interval of the loss of one run. The
        arguments are numbers or arrays."""
        point = {"n_params": n_params, "tokens": tokens, "flops": flops}
        draws = {name: values.reshape(-1, *[1] * np.ndim(flops)) for name, values in self.draws.items()}
        noise = self.noise_draws.reshape(-1, *[1] * np.ndim(flops))
        low, high = np.percentile(expected_loss(draws, point) * np.exp(noise), INTERVAL, axis=0)
        return expected_loss(self.constants, point), low, high

    @property
    def flops_per_token(self):
        """(k, s): a run needs about k * N^s FLOPs per token. If the FLOPs of attention scores were not counted, (k, s)
        would be (6, 1)."""
        sizes = np.log([run.n_params for run in self.runs])
        if np.ptp(sizes) < 1e-9:
            return 6.0, 1.0
        s, log_k = np.polyfit(sizes, np.log([run.flops / run.tokens for run in self.runs]), 1)
        return math.exp(log_k), float(s)

    def size(self, flops):
        """Return (parameters, tokens) for a budget: for L(N, D), the size with the lowest loss; for L(C), the size on
        the line through the runs."""
        if self.form == "L(N, D)":
            return optimal_size(flops, self.constants, *self.flops_per_token)
        budgets = np.log([run.flops for run in self.runs])
        sizes = [[run.n_params for run in self.runs], [run.tokens for run in self.runs]]
        return tuple(np.exp(np.polyval(np.polyfit(budgets, np.log(of), 1), np.log(flops))) for of in sizes)

    def size_interval(self, flops):
        """Return the 90% intervals of the compute-optimal size: ((low, high) of the parameters, (low, high) of the
        tokens). For L(C), return None, because runs on a line do not determine it."""
        if self.form == "L(C)":
            return None
        with np.errstate(all="ignore"):  # if the runs do not determine the law, some refits have extreme sizes
            sizes = optimal_size(flops, self.draws, *self.flops_per_token)
        return tuple(tuple(np.percentile(values, INTERVAL)) for values in sizes)

    def extrapolation(self, flops):
        """Return the ratio of `flops` to the FLOPs of the largest run."""
        return flops / max(run.flops for run in self.runs)

    def ratio_to_line(self, n_params, tokens):
        """Return the factor (1 or more) by which the tokens per parameter of a new run differ from those of the line
        through the fitted runs at the same compute. The form L(N, D) is also valid for runs that are not on the line,
        so for this form, return 1."""
        if self.form != "L(C)":
            return 1.0
        center, axes, _ = _line(self.runs)
        return math.exp(math.sqrt(2) * abs((np.log([n_params, tokens]) - center) @ axes[1]))


def expected_loss(constants, point):
    """Return the loss that a law predicts, without noise.

    constants: {name: number or array}. point: a dictionary with the inputs of the law, numbers or arrays: "n_params"
        and "tokens" for L(N, D), "flops" for L(C).
    """
    terms = FORMS["L(C)" if "K" in constants else "L(N, D)"]
    return constants["E"] + sum(constants[A] / np.power(point[x], constants[a]) for A, a, x in terms)


def optimal_size(flops, constants=CHINCHILLA, k=6.0, s=1.0):
    """Return the (parameters N, tokens) with the lowest loss for `flops`, if a token needs k * N^s FLOPs."""
    A, a, B, b = (constants[name] for name in ("A", "a", "B", "b"))
    n_params = (a * A / (s * b * B) * (flops / k) ** b) ** (1 / (a + s * b))
    return n_params, flops / (k * n_params**s)


def optimal_tokens(n_params, constants=CHINCHILLA):
    """Return the number of tokens for which a model of this size is compute-optimal, with 6 FLOPs per
    parameter and token."""
    A, a, B, b = (constants[name] for name in ("A", "a", "B", "b"))
    return (b * B * n_params**a / (a * A)) ** (1 / b)


def iso_flops(runs):
    """Return the isoFLOP curves of the runs: approach 2 of Hoffmann et al. 2022.

    A curve has at least three models of different sizes with nearly equal compute. A parabola in log N is fitted to the
    losses, and its lowest point is the compute-optimal size.

    Returns:
        list of dictionaries with "flops" (geometric mean), "runs", "parabola" (coefficients for numpy.polyval, of
        log N), and "n_params" (at the lowest point; None if it is not between the smallest and the largest model)
    """
    groups = []
    for run in sorted(runs, key=lambda run: run.flops):
        if not groups or run.flops > SAME_FLOPS * groups[-1][0].flops:
            groups.append([])
        groups[-1].append(run)
    curves = []
    for group in groups:
        sizes = np.log([run.n_params for run in group])
        if len(set(sizes)) < 3:
            continue
        parabola = np.polyfit(sizes, [run.loss for run in group], 2)
        lowest = -parabola[1] / (2 * parabola[0]) if parabola[0] > 0 else math.inf
        curves.append(
            {
                "flops": math.exp(np.mean(np.log([run.flops for run in group]))),
                "runs": group,
                "parabola": parabola,
                "n_params": math.exp(lowest) if sizes.min() <= lowest <= sizes.max() else None,
            }
        )
    return curves


# ---- the fit


def fit(runs, delta=DELTA, n_draws=N_DRAWS):
    """Fit a law to a list of Run, in the form that `choose_form` returns. delta, n_draws: see the constants above.

    Raises:
        ValueError: there are too few different runs.
    """
    form, reason = choose_form(runs)
    terms = FORMS[form]
    losses = np.log([run.loss for run in runs])
    X = np.log([[getattr(run, x) for _, _, x in terms] for run in runs])
    center = X.mean(axis=0)  # centered inputs make the constants nearly independent of each other
    X, lowest, highest = X - center, math.exp(losses.min()), math.exp(losses.max())
    low = np.array([0.0] + [math.log(lowest * 1e-6), EXPONENTS[0]] * len(terms))
    high = np.array([highest] + [math.log(highest * 2), EXPONENTS[1]] * len(terms))

    size, exponents = ((0.1, 0.4), (0.15, 0.35, 0.7)) if len(terms) > 1 else ((0.1, 0.4, 1.0), (0.1, 0.3, 0.6, 1.0))
    ranges = [[0, lowest / 2, 0.8 * lowest], *[np.log(lowest * np.array(size)), exponents] * len(terms)]
    starts = np.array(list(itertools.product(*ranges)))
    found, costs = _minimize(starts, X, losses[None].repeat(len(starts), axis=0), low, high, delta)
    best = found[[costs.argmin()]]

    n_free = len(runs) - best.shape[1]
    rng, fitted = np.random.default_rng(0), _predict(best, X)[0]
    noise = math.sqrt(((losses - fitted) ** 2).sum() / n_free)
    noises = noise * np.sqrt(n_free / rng.chisquare(n_free, n_draws))
    samples = fitted + noises[:, None] * rng.standard_normal((n_draws, len(runs)))
    draws, _ = _minimize(best.repeat(n_draws, axis=0), X, samples, low, high, delta, tolerance=1e-6)

    names = ["E", *(name for A, a, _ in terms for name in (A, a))]
    is_at_bound = (best[0] <= low) | (best[0] >= high)
    return Law(
        runs=tuple(runs),
        form=form,
        reason=reason,
        constants={name: float(values[0]) for name, values in _constants(best, terms, center).items()},
        draws=_constants(draws, terms, center),
        at_bound=tuple(name for name, is_at in zip(names, is_at_bound, strict=True) if is_at),
        noise=noise,
        noise_draws=noises * rng.standard_normal(n_draws),
    )


def choose_form(runs):
    """Return (form, reason). Raise ValueError if the runs are too few or too similar for both forms.

    The exponents a and b of L(N, D) can only be determined if some runs have more tokens per parameter than others.
    """
    n_sizes, n_horizons, n_budgets, n_points = (
        len(set(values))
        for values in (
            [run.n_params for run in runs],
            [run.tokens for run in runs],
            [round(math.log(run.flops), 2) for run in runs],
            [(run.n_params, run.tokens) for run in runs],
        )
    )
    spread = _line(runs)[2]
    if spread >= ON_A_LINE and n_points >= 7 and n_sizes >= 3 and n_horizons >= 3:
        return "L(N, D)", f"the tokens per parameter vary by a factor of {math.exp(spread):.2g} (standard deviation)"
    if n_budgets < 4:
        raise ValueError(
            f"a scaling law needs runs with at least 4 different amounts of compute, but the runs have {n_budgets}; "
            "train more sizes, for example with nanogpt-accel sweep RECIPE depth=3,4,5,6,7"
        )
    if spread < ON_A_LINE:
        return "L(C)", "parameters and tokens are on one line, so the exponents a and b of L(N, D) cannot be told apart"
    return "L(C)", (
        "L(N, D) has 5 constants. It needs at least 7 different runs with at least 3 model sizes and 3 numbers of "
        f"tokens, but there are {n_points} different runs with {n_sizes} model sizes and {n_horizons} numbers of "
        "tokens. The runs are not on one line, so L(C) is inaccurate"
    )


def _line(runs):
    """Fit a line through the runs in (log N, log D). Return (center, axes, spread).

    axes: unit vectors along and across the line. spread: standard deviation of the differences between the
    runs and the line, in log(tokens per parameter).
    """
    points = np.log([[run.n_params, run.tokens] for run in runs])
    center = points.mean(axis=0)
    _, _, axes = np.linalg.svd(points - center)
    return center, axes, math.sqrt(2) * float(((points - center) @ axes[1]).std())


def _constants(theta, terms, center):
    """Convert theta (see _predict) to the constants of the law: {name: array with one value per fit}."""
    constants = {"E": theta[:, 0]}
    for i, (A, a, _) in enumerate(terms):
        constants |= {A: np.exp(theta[:, 1 + 2 * i] + theta[:, 2 + 2 * i] * center[i]), a: theta[:, 2 + 2 * i]}
    return constants


def _predict(theta, X):
    """Return the logarithms of the predicted losses and their derivatives with respect to theta.

    Args:
        theta: (fits, 1 + 2 * terms): E, and per term the logarithm of its value at the center of X, and its exponent.
        X: (runs, terms): centered logarithms of parameters and tokens, or of FLOPs.

    Returns:
        (fits, runs) and (fits, runs, 1 + 2 * terms)
    """
    terms = np.exp(theta[:, None, 1::2] - theta[:, None, 2::2] * X)
    losses = theta[:, :1] + terms.sum(axis=-1)
    derivatives = np.empty((*losses.shape, theta.shape[1]))
    derivatives[..., 0] = 1 / losses
    derivatives[..., 1::2] = terms / losses[..., None]
    derivatives[..., 2::2] = -X * derivatives[..., 1::2]
    return np.log(losses), derivatives


def _minimize(theta, X, targets, low, high, delta, tolerance=1e-10, max_steps=200):
    """Run many fits at the same time, from different starting points or for different targets. Each of them minimizes
    the sum of the Huber losses of the runs.

    This is the Levenberg-Marquardt method with bounds. Runs with a difference above delta get a lower weight. scipy
    runs one fit at a time, so 1,000 refits take about a minute; here, they take a second or less.

    Args:
        theta: (fits, constants), the starting points; see _predict. low, high: (constants,), the bounds of theta.
        targets: (fits, runs), logarithms of losses.
        tolerance: a fit is finished when the relative change of its cost in a step is at most this value.

    Returns:
        (theta, costs): the results (fits, constants), and their sums of Huber losses (fits,).
    """

    def evaluate(theta, targets):
        fitted, J = _predict(theta, X)
        size = np.abs(targets - fitted)
        return np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum(axis=1), targets - fitted, J

    results, costs, diagonal = np.clip(theta, low, high), np.empty(len(theta)), np.arange(theta.shape[1])
    active, damping = np.arange(len(theta)), np.full(len(theta), 1e-2)  # fits that are not finished
    theta, (cost, difference, J) = results.copy(), evaluate(results, targets)
    for _ in range(max_steps):
        weighted = J * (delta / np.maximum(np.abs(difference), delta))[..., None]
        gradient = (weighted * difference[..., None]).sum(axis=1)
        # a constant at a bound stays there if its gradient points outside
        is_free = ~((theta <= low) & (gradient < 0) | (theta >= high) & (gradient > 0))
        hessian = np.swapaxes(weighted, 1, 2) @ J * is_free[:, :, None] * is_free[:, None, :]
        hessian[:, diagonal, diagonal] = hessian[:, diagonal, diagonal] * (1 + damping[:, None]) + ~is_free + 1e-14
        step = np.linalg.solve(hessian, (gradient * is_free)[..., None])[..., 0]
        proposed = np.clip(theta + step, low, high)
        new_cost, new_difference, new_J = evaluate(proposed, targets[active])
        is_better = new_cost < cost
        is_done = (np.abs(cost - new_cost) <= tolerance * cost) | (damping >= 1e12)
        damping = np.where(is_better, damping / 5, damping * 4)
        theta, cost = np.where(is_better[:, None], proposed, theta), np.minimum(cost, new_cost)
        difference = np.where(is_better[:, None], new_difference, difference)
        J = np.where(is_better[:, None, None], new_J, J)
        results[active], costs[active] = theta, cost
        active, damping, theta, cost, difference, J = (
            values[~is_done] for values in (active, damping, theta, cost, difference, J)
        )
        if not len(active):
            break
    return results, costs
