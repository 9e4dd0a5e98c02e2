"""Prompts from a data set of the Hugging Face hub (or a folder that `datasets` can load), with a map of its columns.

Only data is loaded: a data set that needs code of its own to be loaded is refused by `datasets`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from pydantic import model_validator

from posttrain.errors import UserError
from posttrain.tasks import Split
from posttrain.tasks._rows import Record, RowOptions, RowTask


class Options(RowOptions):
    """Options of the task `hub`."""

    name: str
    """Name on the hub, such as `openai/gsm8k`, or a folder."""
    config: str | None = None
    """Configuration (subset) of the data set."""
    train_split: str = "train"
    eval_split: str | None = None
    """By default, `eval_share` of the rows of `train_split` is held out."""
    revision: str | None = None
    """Branch, tag or commit; a commit makes the run repeatable."""

    @model_validator(mode="after")
    def _one_source_of_evaluation(self) -> Options:
        if self.eval_split is not None and "eval_share" in self.model_fields_set:
            raise ValueError("eval_share has no effect beside a split for evaluation: remove one of them")
        return self


class Task(RowTask):
    """Rows of one or two splits of a data set."""

    name = "hub"
    options: Options

    def records(self) -> Iterator[tuple[Split | None, str, Record]]:
        """The records of the split for evaluation, if there is one, and then those of the split for training.

        Raises:
            UserError: the data set, its configuration, split or revision cannot be loaded.
        """
        options = self.options
        splits: list[tuple[Split | None, str]] = [(None, options.train_split)]
        if options.eval_split is not None:
            splits = [("eval", options.eval_split), ("train", options.train_split)]
        for split, source in splits:
            records = load_split(options.name, options.config, source, options.revision, images=self.images)
            for number, record in enumerate(records, start=1):
                yield split, f"{options.name} [{source}], row {number}", record


def load_split(
    name: str, config: str | None, split: str, revision: str | None, *, images: bool = False
) -> Iterator[Record]:
    """The records of one split of a data set.

    Args:
        images: rows are decoded one by one, so that an image that cannot be costs no more than its row.

    Raises:
        UserError: the data set, its configuration, split or revision cannot be loaded.
    """
    import datasets

    try:
        data = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # network, hub, file system and parsers each raise their own
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"The data set '{name}' [{split}] cannot be loaded ({type(error).__name__}: {reason}): check name, config, "
            "split and revision."
        ) from error
    if not images:
        yield from data
        return
    from PIL import Image

    for place in range(len(data)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                record = data[place]
        except Exception as error:  # of whatever decodes the row
            yield ValueError(f"the row cannot be decoded ({type(error).__name__}: {error})")
        else:
            yield record
