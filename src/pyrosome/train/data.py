"""What a recipe trains on: its tokenizer, and samples of its stages by number."""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyrosome import tasks
from pyrosome.chat.tokenizer import Tokenizer
from pyrosome.errors import CheckpointError
from pyrosome.tasks.sample import Sample
from pyrosome.tasks.text import Text
from pyrosome.train.batch import Source
from pyrosome.train.recipe import TEXT, Mix, Recipe, Stage
from pyrosome.train.samples import Encoded, Encoder
from pyrosome.train.tokenizer import save_tokenizer, task_words, template_texts, train_tokenizer

CHARACTERS_PER_TOKEN = 2.5  # of corpus text, about: passages are cut to their length in tokens afterwards
_TOKENIZER_TEXT = 400_000  # characters of corpora that a tokenizer learns from


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def tokenizer_for(recipe: Recipe, directory: Path, start_from: Path | None = None) -> Path:
    """The directory of the run's tokenizer: where there is none yet, that of `start_from`, or one that is trained.

    Raises:
        CheckpointError: it has another number of ids than the recipe says, or `start_from` has no tokenizer.
    """
    home = directory / "tokenizer"
    if not home.exists():
        part = directory / ".tokenizer.partial"  # a run killed here begins it anew
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if start_from is not None:  # ids must mean what they meant to those weights
            Tokenizer.from_dir(start_from)
            for name in TOKENIZER_FILES:
                if (start_from / name).exists():
                    shutil.copyfile(start_from / name, part / name)
            part.rename(home)
    if not home.exists():
        text, rng = corpus(), random.Random(recipe.seed)
        passages = [text.passage(rng, 2000, False) for _ in range(_TOKENIZER_TEXT // 2000)]
        words = task_words(recipe.tokenizer.vocab_size)
        save_tokenizer(train_tokenizer(passages, recipe.tokenizer.vocab_size, words, template_texts()), part)
        part.rename(home)
    found = Tokenizer.from_dir(home).vocab_size
    if found != recipe.tokenizer.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {home} has {found:,} ids and the recipe's tokenizer.vocab_size is "
            f"{recipe.tokenizer.vocab_size:,}: weights and ids would not go together; set "
            f"tokenizer.vocab_size={found}, or train in another directory"
        )
    return home


@functools.cache
def corpus() -> Text:
    """The text found on this machine."""
    return Text()


class Samples:
    """Encoded samples of a recipe's stages."""

    def __init__(self, recipe: Recipe, tokenizer: Path) -> None:
        self.recipe = recipe
        self.encoder = Encoder(tokenizer, recipe.loss.background)
        self._heldout: dict[str, list[Encoded]] = {}

    def source(self, stage: Stage) -> Source:
        """Training samples of a stage, by number."""
        return Source(self.recipe.seed, stage.name, stage.mix, lambda mix, rng: self.encoded(mix, rng, heldout=False))

    def heldout(self, mix: Mix, count: int) -> list[Encoded]:
        """The same held-out samples every time: `count` of one source."""
        key = f"heldout/{mix.kind}/{mix.length}/{sorted(mix.knobs.items())}"
        made = self._heldout.setdefault(key, [])  # every evaluation asks for them again
        made += [self.encoded(mix, random.Random(f"{key}/{i}"), heldout=True) for i in range(len(made), count)]
        return made[:count]

    def encoded(self, mix: Mix, rng: random.Random, *, heldout: bool) -> Encoded:
        """One sample of a source; a passage of text is cut at its greatest length and a tenth."""
        sample, most = self.encoder(make(mix, rng, heldout=heldout)), mix.length[1] + mix.length[1] // 10
        if mix.kind != TEXT:
            return sample
        weight = [w * self.recipe.loss.text for w in sample.weight[:most]]
        return Encoded(sample.ids[:most], weight, sample.answer[:most], sample.kind)


def make(mix: Mix, rng: random.Random, *, heldout: bool) -> Sample:
    """One sample of a source: lengths are drawn so that each doubling is as likely as the next."""
    low, high = mix.length
    length = round(low * (high / low) ** rng.random())
    if mix.kind == TEXT:
        return corpus().sample(rng, int(length * CHARACTERS_PER_TOKEN), heldout)
    return tasks.make(mix.kind, rng, length, heldout, **mix.knobs)


def in_steps(samples: Sequence[Encoded], max_tokens: int) -> Iterator[list[Encoded]]:
    """Samples in groups that fit in a step."""
    group: list[Encoded] = []
    for sample in samples:
        if group and sum(len(s.ids) for s in group) + len(sample.ids) > max_tokens:
            yield group
            group = []
        group.append(sample)
    if group:
        yield group
