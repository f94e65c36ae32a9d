"""Score models on tasks of lm-eval (EleutherAI's evaluation harness), during or after training."""

import contextlib
import io
import logging
import random
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from ..utils.text import one_line

LM_EVAL = "0.4.12"  # the oldest version whose TaskManager has load()
# DCLM's CORE set (Li et al. 2024, DataComp-LM), in lm-eval's versions: {name: (task, few-shot examples, accuracy of
# random answers)}. lm-eval has 21 of the 22 tasks; it has no Jeopardy.
CORE = {
    "agieval_lsat_ar": ("agieval_lsat_ar", 3, 0.2),
    "arc_easy": ("arc_easy", 10, 0.25),
    "arc_challenge": ("arc_challenge", 10, 0.25),
    "bigbench_cs_algorithms": ("bigbench_cs_algorithms_generate_until", 10, 0),
    "bigbench_dyck_languages": ("bigbench_dyck_languages_generate_until", 10, 0),
    "bigbench_language_identification": ("bigbench_language_identification_multiple_choice", 10, 1 / 11),
    "bigbench_operators": ("bigbench_operators_generate_until", 10, 0),
    "bigbench_qa_wikidata": ("bigbench_qa_wikidata_generate_until", 10, 0),
    "bigbench_repeat_copy_logic": ("bigbench_repeat_copy_logic_generate_until", 10, 0),
    "boolq": ("boolq", 10, 0.62),  # accuracy of always answering yes
    "commonsense_qa": ("commonsense_qa", 10, 0.2),
    "copa": ("copa", 0, 0.5),
    "coqa": ("coqa", 0, 0),
    "hellaswag": ("hellaswag", 0, 0.25),
    "hellaswag_10shot": ("hellaswag", 10, 0.25),
    "lambada": ("lambada_openai", 0, 0),
    "openbookqa": ("openbookqa", 0, 0.25),
    "piqa": ("piqa", 10, 0.5),
    "squad": ("squad_completion", 10, 0),
    "winograd": ("wsc273", 0, 0.5),
    "winogrande": ("winogrande", 0, 0.5),
}
CORE_METRICS = ("acc_norm", "acc", "exact_match", "em", "contains")  # use the first that a task reports
FEWSHOT_SEED = 1234  # lm-eval's default


def check_tasks(tasks, tasks_dir=None, section=""):
    """Check the installed lm-eval and the folder of task files. Return a list of problems.

    section: prefix of the settings in the messages, such as "train.".
    """
    try:
        is_missing = Version(metadata.version("lm_eval")) < Version(LM_EVAL)
    except metadata.PackageNotFoundError:  # not installed, or a clone on PYTHONPATH
        is_missing = find_spec("lm_eval") is None
    problems = []
    if is_missing:
        # not the extra [eval], because its command differs between a clone and a wheel
        fix = f'run pip install "lm-eval>={LM_EVAL}"'
        problems.append(f"{section}tasks={','.join(tasks)}: requires lm-eval {LM_EVAL} or newer; {fix}")
    if tasks_dir and not Path(tasks_dir).is_dir():
        problems.append(f"{section}tasks_dir={tasks_dir}: no such folder; set it to the folder of your task files")
    return problems


def load_tasks(names, tasks_dir=None, num_fewshot=None, section=""):
    """Load tasks of lm-eval and their datasets.

    Args:
        names: tasks, groups or tags of lm-eval, patterns such as mmlu_*, or "core" for the tasks of CORE.
        tasks_dir: folder with more task files. num_fewshot: examples per prompt; None: as in the task or in CORE.
        section: see check_tasks.

    Returns:
        The tasks, in the form that lm-eval's `evaluate` accepts.

    Raises:
        ValueError: lm-eval has no such task, or a dataset cannot be loaded.
    """
    from huggingface_hub.utils import logging as hub_logging
    from lm_eval.tasks import TaskManager

    manager, own, found, core = TaskManager(include_path=tasks_dir), [name for name in names if name != "core"], [], {}
    if unknown := [name for name in own if not manager.match_tasks([name])]:
        raise ValueError(
            f"{section}tasks={','.join(unknown)}: unknown to lm-eval; `lm-eval ls tasks` lists all tasks; to use your "
            "own task files, set tasks_dir to their folder"
        )
    hub_logging.set_verbosity_error()  # no warning per retry; the error below has the reason
    core_tasks = {f"core_{name}": task for name, (task, _, _) in CORE.items()} if "core" in names else {}
    for label, name in [(None, name) for name in (manager.match_tasks(own) if own else [])] + [*core_tasks.items()]:
        try:
            loaded = manager.load(name)
            if label:
                core[label] = loaded["tasks"][name]
                continue
            group = loaded["groups"].get(name)
            found += [group] if group else loaded["tasks"].values()
            manager.load(found)  # fails if two groups contain the same task
        except Exception as error:  # from datasets, the libraries that it uses, or the code of a task
            raise ValueError(
                f"{section}tasks={name}: lm-eval cannot load this task or its dataset ({type(error).__name__}: "
                f"{one_line(error)}); check the network, HF_HUB_OFFLINE and HF_ENDPOINT, or your own task files"
            ) from error
    tasks = manager.load(found)
    for task in tasks["tasks"].values():
        default = task.get_config("num_fewshot")
        if num_fewshot is not None and default != 0:  # as in lm-eval, a 0 in a task file cannot be overridden
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
    for label, task in core.items():
        shots = CORE[label.removeprefix("core_")][1]
        task.set_config(key="num_fewshot", value=shots if num_fewshot is None else num_fewshot)
    tasks["tasks"] = {**tasks["tasks"], **core}
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


@contextlib.contextmanager
def quiet():
    """Hide the log and the progress bars of lm-eval, and the warnings of the libraries that it uses."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def score_tasks(lm, tasks, limit=None, with_errors=True):
    """Return the scores of a model: {task: {metric: number}}, or None on ranks other than 0.

    lm: an lm-eval model. tasks: from load_tasks. limit: maximum number of questions per task. with_errors: whether to
    compute standard errors. The states of the random number generators are restored.
    """
    import numpy as np
    import torch
    from lm_eval.evaluator import evaluate

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)  # the seeds of lm-eval's own command
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    try:
        results = evaluate(lm, tasks, limit=limit, log_samples=False, bootstrap_iters=100_000 if with_errors else 0)
    finally:
        for restore, state in zip((random.setstate, np.random.set_state, torch.set_rng_state), states, strict=True):
            restore(state)
    if results is None:
        return None
    return {
        task: {key: float(value) for key, value in values.items() if type(value) in (int, float) and "," in key}
        for task, values in results["results"].items()
    }


def task_scores(setup, data, tasks, limit):
    """Return the scores of a training run's model on tasks: {"TASK/METRIC": number}. All ranks must call this function.
    Each rank evaluates a part of the questions, and all ranks return the same scores.

    setup: the Setup of the run. data: its RunData. tasks: from load_tasks. limit: maximum number of questions per task.
    """
    from accelerate.utils import broadcast_object_list
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    model, accelerator = setup.raw_model, setup.accelerator
    was_training = model.training
    with quiet(), tempfile.TemporaryDirectory() as folder:
        data.tokenizer.save(folder, max_length=model.config.block_size, has_pad=model.config.pad_token_id is not None)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        try:
            lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=setup.recipe.train.batch_size)
            lm.accelerator, lm._rank, lm._world_size = accelerator, accelerator.process_index, accelerator.num_processes
            results = [score_tasks(lm, tasks, limit, with_errors=False)]
        finally:
            model.train(was_training)
    broadcast_object_list(results)
    scores = {f"{task}/{name_of(key)}": value for task, values in results[0].items() for key, value in values.items()}
    core = core_average(results[0])
    return scores | ({} if core is None else {"core/centered": core})


def name_of(key):
    """Convert lm-eval's "METRIC,FILTER" to a name of a score: acc for "acc,none", acc_FILTER for other filters."""
    return key.removesuffix(",none").replace(",", "_")


def core_average(results):
    """Return the mean of the centered accuracies of CORE: 0 for random answers, 1 for perfect ones. Return None if the
    results do not contain CORE. results: {task: {metric: number}}."""
    centered = []
    for name, (_, _, baseline) in CORE.items():
        values = {key.split(",")[0]: value for key, value in results.get(f"core_{name}", {}).items()}
        accuracy = next((values[metric] for metric in CORE_METRICS if metric in values), None)
        if accuracy is not None:
            centered.append((accuracy - baseline) / (1 - baseline))
    return sum(centered) / len(centered) if centered else None
