"""The data of a run: one or several sources, and named validation sets. The mix of sources can change during the run.

Each source and each validation set has a separate data folder; see dataset.py. A recipe without `mix`, `stages` and
`validation` has one source, its corpus.
"""

from dataclasses import dataclass
from fractions import Fraction

from ..utils.fields import raise_problems
from . import dataset
from .manifest import is_data_folder
from .prepare import ready
from .token_files import TokenFile

MANY_EPOCHS = 4  # up to 4 epochs, repeated tokens are nearly as good as new ones (Muennighoff et al. 2023)


@dataclass(frozen=True)
class RunData:
    """The opened data of a run.

    Attributes:
        sources: {name: Dataset}. validation: {name: ValidationTokens}.
        stages: ((first step, {source: share}), ...); see Recipe.stages.
        sections: {name: data section} of the sources and validation sets, with the val_fraction that was used.
    """

    sources: dict
    validation: dict
    stages: tuple
    sections: dict

    @property
    def main(self):
        """The first source. Its tokenizer is that of the run."""
        return next(iter(self.sources.values()))

    @property
    def tokenizer(self):
        """The tokenizer of the run. Special tokens in prompts are encoded as in the first source that contains any."""
        tokenizers = [source.tokenizer for source in self.sources.values()]
        return next((tokenizer for tokenizer in tokenizers if tokenizer.special_tokens), tokenizers[0])

    @property
    def train(self):
        """The training tokens of each source: {name: TokenFile}."""
        return {name: source.train for name, source in self.sources.items()}

    @property
    def val_sets(self):
        """All validation sets: {name: tokens}. The sources are first."""
        return {name: source.val for name, source in self.sources.items()} | self.validation

    @property
    def identity(self):
        """Hashes of the tokens of each source, and the mixes, as JSON values. A run resumes from a checkpoint only if
        these values are the same, or if mix_change is true."""
        if len(self.sources) == 1:
            return self.main.identity
        sources = [{"name": name, **source.identity} for name, source in self.sources.items()]
        tokenizer = [source.pop("tokenizer") for source in sources][0]
        stages = [{"from": step, "mix": {name: str(share) for name, share in mix.items()}} for step, mix in self.stages]
        return {"tokenizer": tokenizer, "sources": sources, "stages": stages}

    def mean(self, values):
        """Return the mean of {source: value}, weighted by the shares of the sources in the first stage."""
        return sum(float(share) * values[name] for name, share in self.stages[0][1].items())

    def val_size(self):
        """Return (number of tokens, bytes of text) of the validation data. For a mix, return (1, mean bytes per token).
        The second value is None if unknown."""
        if len(self.sources) == 1:
            return len(self.main.val), self.main.text_bytes("val")
        sizes = {name: source.text_bytes("val") for name, source in self.sources.items()}
        if None in sizes.values():
            return 1, None
        return 1, self.mean({name: size / len(self.sources[name].val) for name, size in sizes.items()})

    def pin(self, section):
        """Return the data section of a recipe with data_dir set to the folders of these data. A resumed run then reads
        the same tokens even if the text of a corpus changes. If a stage starts at a share of max_iters, replace the
        share by a step number, which stays the same if max_iters is increased."""
        folders = {name: found.folder.as_posix() for name, found in (self.sources | self.validation).items()}

        def changes(name):
            used = self.sections[name]
            fraction = {} if used.val_fraction == section.val_fraction else {"val_fraction": used.val_fraction}
            return {"data_dir": folders[name]} | fraction

        def pinned(member, name):
            return member.model_copy(update=changes(name)) if member.given else member

        def pinned_mix(mix):
            return [pinned(source, source.label) for source in mix]

        stages = [
            stage.model_copy(update={"start": float(start), "mix": pinned_mix(stage.mix)})
            for stage, (start, _) in zip(section.stages, self.stages[1:], strict=True)
        ]
        validation = {name: pinned(member, name) for name, member in section.validation.items()}
        first = {} if section.mix else changes("corpus")
        return section.model_copy(
            update={"mix": pinned_mix(section.mix), "stages": stages, "validation": validation} | first
        )


class ValidationTokens(TokenFile):
    """The tokens of a validation set, and the data folder that they are from."""

    def __init__(self, opened, split):
        parts = opened.splits.values() if split == "all" else [opened.splits[split]]
        paths, spans = ([item for part in parts for item in getattr(part, key)] for key in ("paths", "spans"))
        super().__init__(paths, opened.train.dtype, spans)
        self.folder = opened.folder


def sections(data):
    """Return {name: data section} for each source and validation set of a data section.

    If the tokenizer is char or bpe, it is made from the first source. The other sources and validation sets use it.
    Prepared data have a tokenizer of their own, which open_run_data compares with that of the first source.
    """
    members = {**data.sources, **data.validation}
    found = {name: member.section(data) for name, member in members.items()}
    first, *others = found
    if others and data.tokenizer in ("char", "bpe"):
        folder = str(dataset.data_folder(found[first]))
        for name in others:
            has_own = found[name].data_dir and dataset.is_prepared(found[name])
            # gpt2, the default value, accepts prepared data with any tokenizer
            found[name] = found[name].model_copy(update={"tokenizer": "gpt2" if has_own else folder})
    return found


def where(data, name):
    """Return the text at the start of messages about a source or a validation set: the setting that defines it, or ""
    if the run has only one source."""
    if name in data.validation:
        return f"data.validation.{name}: "
    return f"data.mix: {name}: " if len(data.sources) > 1 else ""


def uses_val(data, name):
    """Return whether the run evaluates on the val split of this source or validation set."""
    return name not in data.validation or data.validation[name].split == "val"


def has_tokenizer(data, section):
    """Return whether the tokenizer of a section exists, or will be made from the corpus of this section."""
    return section.tokenizer in ("gpt2", data.tokenizer) or is_data_folder(section.tokenizer)


def is_prepared(data):
    """Return whether the token files of all sources and validation sets exist."""
    return all(has_tokenizer(data, found) and dataset.is_prepared(found) for found in sections(data).values())


def check(data, block_size=None):
    """Check all sources and validation sets without tokenizing anything; see dataset.check."""
    try:
        found = sections(data)
    except (ValueError, OSError) as error:  # the corpus of the first source does not exist
        return [str(error)]
    problems = []
    for name, section in found.items():
        if not has_tokenizer(data, section):  # check only the corpus, because the tokenizer does not exist yet
            section = section.model_copy(update={"tokenizer": "gpt2"})
        size = None if name in data.validation else block_size
        problems += [where(data, name) + problem for problem in dataset.check(section, size)]
    return problems


def open_run_data(recipe, block_size, report=print):
    """Open the data of a recipe as RunData, after preparing them if needed; see prepare.ready.

    Raises:
        ValueError: a data folder is invalid, a split is missing, or the tokenizers differ.
    """
    data, opened, used, problems = recipe.data, {}, {}, []
    for name, section in sections(data).items():
        needed = block_size if uses_val(data, name) else 0
        used[name], opened[name] = ready(section, report, needed, recipe.train.collective_timeout)
    first = next(iter(opened))
    for name, found in opened.items():
        if not found.tokenizer.is_same(opened[first].tokenizer):
            problems.append(
                f"{where(data, name)}{found.folder} has a {found.tokenizer.kind} tokenizer (vocabulary size "
                f"{found.tokenizer.vocab_size:,}), which differs from that of {opened[first].folder}; all data of a "
                "run need the same tokenizer"
            )
        split = data.validation[name].split if name in data.validation else "val"
        if split not in ("all", *found.splits):
            problems.append(f"{where(data, name)}split={split}: not in {found.folder}; set split to all or val")
    raise_problems(problems)
    sources = {name: opened[name] for name in data.sources}
    validation = {name: ValidationTokens(opened[name], member.split) for name, member in data.validation.items()}
    return RunData(sources, validation, recipe.stages, used)


def require_blocks(data, opened, block_size):
    """Check that all splits have at least the block_size + 1 tokens of a sample. Return a list of problems.

    data: the data section. opened: its RunData.
    """
    problems = [
        where(data, name) + problem
        for name, source in opened.sources.items()
        for problem in dataset.require_block(opened.sections[name], source.manifest, block_size)
    ]
    for name, tokens in opened.validation.items():
        if len(tokens) <= block_size:
            split = data.validation[name].split
            problems.append(
                f"{where(data, name)}split={split} has {len(tokens):,} tokens, but a sample has {block_size + 1:,}; "
                + ("" if split == "all" else "set split to all, or ")
                + "use a larger corpus"
            )
    return problems


def differences(before, now):
    """Describe in words how two identities (see RunData.identity) differ."""
    if not ("sources" in before and "sources" in now):
        return "other training data"
    old, new = ({source["name"]: source for source in identity["sources"]} for identity in (before, now))
    parts = [f"the source {name} is missing" for name in old if name not in new]
    parts += [f"the source {name} is new" for name in new if name not in old]
    parts += [f"the source {name} has other tokens" for name in new if name in old and new[name] != old[name]]
    if before["stages"] != now["stages"]:
        parts.append(f"the mix is {describe_stages(now)} instead of {describe_stages(before)}")
    return "; ".join(parts) or "the sources have another order"


def describe_stages(identity):
    """Return the stages of an identity as text: `web 0.7, code 0.3 from step 0 and web 0.5, code 0.5 from step 800`."""
    texts = []
    for stage in identity["stages"]:
        mix = ", ".join(f"{name} {float(Fraction(share)):.4g}" for name, share in stage["mix"].items())
        texts.append(f"{mix} from step {stage['from']:,}")
    return " and ".join(texts)


def mix_table(recipe, train_tokens):
    """Return a dictionary per source, with the number of tokens in the source and the number that the run uses.

    train_tokens: {source: number of training tokens, or None if unknown}.
    """
    used = recipe.source_tokens()
    rows = []
    for name, n_tokens in train_tokens.items():
        shares = [float(shares.get(name, 0)) for _, shares in recipe.stages]
        epochs = used[name] / n_tokens if n_tokens else None
        rows.append(
            {"source": name, "train_tokens": n_tokens, "shares": shares, "tokens": used[name], "epochs": epochs}
        )
    return rows


def describe_mix(starts, rows):
    """Yield lines of text about the sources of a mix.

    starts: the first step of each stage. rows: the result of mix_table.
    """
    if len(starts) > 1:
        yield "the shares change at step " + " and ".join(f"{step:,}" for step in starts[1:])
    width = max(len(row["source"]) for row in rows)
    for row in rows:
        size = f"{row['train_tokens']:,} tokens" if row["train_tokens"] else "not prepared"
        shares = ", then ".join(f"{share:.4g}" for share in row["shares"])
        epochs = f", {row['epochs']:.2f} epochs" if row["epochs"] is not None else ""
        yield f"{row['source']:<{width}}  {size}, share {shares}: {row['tokens']:,} tokens of the run{epochs}"
    for row in rows:
        if (row["epochs"] or 0) > MANY_EPOCHS:
            yield (
                f"warning: {row['source']}: {row['epochs']:.1f} epochs; above {MANY_EPOCHS}, repeated tokens help much "
                "less than new ones (Muennighoff et al. 2023); lower its weight, or add data"
            )
