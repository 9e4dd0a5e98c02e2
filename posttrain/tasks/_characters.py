"""What the character-level tasks share: alphabet and chat template.

A conversation reads `^337=24?3*7+3<eos>`: `^` opens the user's turn and `?` closes it, so the template needs no
generation prompt. The loss mask of supervised fine-tuning covers the answer and the end of the sequence.
"""

from __future__ import annotations

from posttrain.tasks._drawn import DrawnTask

ALPHABET = "0123456789+-*=^?"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}^{{ message['content'] }}?"
    "{% elif message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)


class CharacterTask(DrawnTask):
    """A procedural task that a small model over characters can be made for."""

    @property
    def alphabet(self) -> str | None:
        """Digits, operators, and the signs that frame a prompt."""
        return ALPHABET

    @property
    def chat_template(self) -> str | None:
        """`^{prompt}?{answer}{eos}`, where there is an alphabet."""
        return None if self.alphabet is None else CHAT_TEMPLATE
