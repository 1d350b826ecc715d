"""Policies, and the question about them that ShieldGemma was trained to answer.

The form is that of its model card, and of figure 2 in Zeng et al. 2024, "ShieldGemma: Generative AI Content
Moderation Based on Gemma": the text in a turn of its own, one guideline, and a question whose answer begins
with "Yes" (it violates the guideline) or "No". The score is the share of the first in the probability of both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from server.chat_template import ControlToken, RenderedChat
from server.config import OptionError, parse_yaml
from server.tokenizer import BOS, END_OF_TURN, START_OF_TURN, Tokenizer

YES, NO = "Yes", "No"
DEFAULT_THRESHOLD = 0.5
MAX_POLICIES = 64


class Policy(BaseModel):
    """What a text must not do."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_/-]{1,64}$")
    """The category in answers."""
    guideline: str = Field(min_length=1, max_length=10_000)
    """As the model is told: its title in quotation marks, a colon, and what the prompt shall not contain."""
    threshold: float = Field(default=DEFAULT_THRESHOLD, gt=0, le=1)
    """The least score that is flagged."""


_NO_CONTENT = "The prompt shall not contain or seek generation of content that"

BUILT_IN_POLICIES = (
    Policy(
        name="dangerous_content",
        guideline=f'"No Dangerous Content": {_NO_CONTENT} harming oneself and/or others (e.g., accessing or '
        "building firearms and explosive devices, promotion of terrorism, instructions for suicide).",
    ),
    Policy(
        name="harassment",
        guideline=f'"No Harassment": {_NO_CONTENT} is malicious, intimidating, bullying, or abusive content '
        "targeting another individual (e.g., physical threats, denial of tragic events, disparaging victims of "
        "violence).",
    ),
    Policy(
        name="hate_speech",
        guideline=f'"No Hate Speech": {_NO_CONTENT} targeting identity and/or protected attributes (e.g., '
        "racial slurs, promotion of discrimination, calls to violence against protected groups) or "
        "dehumanizing/belittling/vilifying on the bases of race, ethnicity, religion, disability, age, "
        "nationality, veteran status, sexual orientation, gender, gender identity, caste, or any other "
        "protected status. We do allow content that includes a reference to a protected individual or group in "
        "a positive manner.",
    ),
    Policy(
        name="sexually_explicit",
        guideline=f'"No Sexually Explicit Information": {_NO_CONTENT} contains references to sexual acts or '
        "other lewd content (e.g., sexually graphic descriptions, content aimed at causing arousal). Medical "
        "or scientific terms related to human anatomy or sex education are permitted.",
    ),
)
"""The four that the model knows, in the very words that it was trained with: it is sensitive to them."""


def load_policies(path: Path | None) -> tuple[Policy, ...]:
    """Those of a JSON or YAML file, a list of objects with the fields of Policy, instead of the built-in ones.

    Raises OptionError.
    """
    if path is None:
        return BUILT_IN_POLICIES
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"), f"--moderation-policies {path}")
        policies = tuple(_policies.validate_python(content))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--moderation-policies {path}: {error}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise OptionError(f"--moderation-policies {path}: {where}: {problem['msg']}") from None
    if len({policy.name for policy in policies}) < len(policies):
        raise OptionError(f"--moderation-policies {path}: two policies have one name")
    return policies


def question(text: str, policy: Policy, tokenizer: Tokenizer) -> RenderedChat:
    """The prompt; control tokens typed in `text` are text. Raises ValueError for a model without turns."""
    if tokenizer.start_of_turn_id is None or tokenizer.end_of_turn_id is None:
        raise ValueError("this model cannot moderate: its tokenizer has no turn tokens")
    return RenderedChat(
        segments=(
            ControlToken(tokenizer.bos_id, BOS),
            "You are a policy expert trying to help determine whether a user prompt is in violation of the "
            "defined safety policies.\n\n",
            ControlToken(tokenizer.start_of_turn_id, START_OF_TURN),
            f"\nHuman Question: {text.strip()}\n",
            ControlToken(tokenizer.end_of_turn_id, END_OF_TURN),
            f"\n\nOur safety principle is defined in the below:\n\n* {policy.guideline}\n\n===\n\nDoes the "
            f"human question violate the above principle? Your answer must start with '{YES}' or '{NO}'. And "
            "then walk through step by step to be sure we answer correctly.",
        ),
        notes=(),
    )


def answer_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens that begin the two answers. Raises ValueError for a tokenizer that cuts them."""
    ids = [tokenizer.encode_text(word) for word in (YES, NO)]
    if ids[0][0] == ids[1][0]:
        raise ValueError(f'this model cannot moderate: "{YES}" and "{NO}" begin with one token')
    return ids[0][0], ids[1][0]


def score(yes: float, no: float) -> float:
    """0..1, from the logprobs of the two answers."""
    return 1 / (1 + math.exp(min(no - yes, 700.0)))


_policies: TypeAdapter[Sequence[Policy]] = TypeAdapter(
    Annotated[list[Policy], Field(min_length=1, max_length=MAX_POLICIES)]
)
