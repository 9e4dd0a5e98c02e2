r"""Language (shaping): the share of a completion's letters that belong to the scripts of one language, from 0 to 1.

A policy that mixes languages in its thought is hard to read, and rewards for correctness alone do not mind. What counts
is the script of each letter, so this tells Chinese from English and not French from English; the whole completion is
looked at, its thought included, but not what no language is written in: code (`` ` `` and ` ``` `), formulas (`$...$`,
`$$...$$`, `\(...\)`, `\[...\]`, `\boxed{...}`), tags, addresses and commands of LaTeX. Japanese may use kanji, and
Korean hanja counts as foreign.

A completion without any letter left is `no_answer` with 0.0: formulas alone would else be the safest language.

With a `threshold` the reward is 1.0 from that share on and 0.0 below, which leaves room for names. Status: `ok` at 1.0,
else `wrong`. `Verdict.answer` is the share.

Source: the language-consistency reward of DeepSeek-R1, arXiv 2501.12948, section 2.3.2. Differs: letters by script,
where it counts words of the target language.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator

from posttrain.errors import did_you_mean
from posttrain.rewards import RewardOptions, Verdict, Verifier
from posttrain.rewards._scripts import SCRIPTS, scripts

_OPENING = re.compile(r"```|``|`|\$\$|\$|\\\(|\\\[|\\boxed\{|</?[A-Za-z]{1,20}>|https?://\S*|\\[A-Za-z]+")
_CLOSING = {
    "```": "```",
    "``": "``",
    "`": "`",
    "$$": "$$",
    "$": "$",
    "\\(": "\\)",
    "\\[": "\\]",
    "\\boxed{": "}",
}


class Options(RewardOptions):
    """Options of the reward `language`."""

    language: str | None = None
    """Code of the language (`en`, `zh`, ...); default: each row says its own in the column `language`."""
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of letters from which the reward is 1.0, and 0.0 below. Default: the reward is the share."""

    @field_validator("language")
    @classmethod
    def _known(cls, language: str | None) -> str | None:
        if language is not None and language not in SCRIPTS:
            raise ValueError(f"there is no language '{language}'{did_you_mean(language, SCRIPTS)}".rstrip("?"))
        return language


class Reward(Verifier):
    """Shaping: the share of letters of the right script."""

    name = "language"
    accuracy = False

    def __init__(self, options: Options) -> None:
        self.options = options
        self.requires = ("language",) if options.language is None else ()

    def verify(self, completion: str, row: Mapping[str, Any]) -> Verdict:
        """Count the letters of each script outside of code and formulas."""
        language = row["language"] if self.options.language is None else self.options.language
        if not isinstance(language, str) or language not in SCRIPTS:
            return Verdict(None, "unparseable_gold", detail=f"the language {language!r:.80} is not known")
        letters = scripts(unicodedata.normalize("NFKC", prose(completion)))
        if not letters.total():
            return Verdict(0.0, "no_answer", detail="no letter outside of code and formulas")
        share = sum(letters[script] for script in SCRIPTS[language]) / letters.total()
        reward = share if self.options.threshold is None else float(share >= self.options.threshold)
        return Verdict(reward, "ok" if reward == 1.0 else "wrong", f"{share:.4f}")


def prose(text: str) -> str:
    """A text without code, formulas, tags, addresses and commands; what is opened and never closed stays.

    One pass: behind every opening sign its closing sign is looked for once.
    """
    last = {opening: text.rfind(closing) for opening, closing in _CLOSING.items()}
    kept: list[str] = []
    position = 0
    while (found := _OPENING.search(text, position)) is not None:
        kept.append(text[position : found.start()])
        position = found.end()
        closing = _CLOSING.get(found[0])
        if closing is None:
            kept.append(" ")
        elif last[found[0]] >= position:
            position = text.find(closing, position) + len(closing)
            kept.append(" ")
    kept.append(text[position:])
    return "".join(kept)
