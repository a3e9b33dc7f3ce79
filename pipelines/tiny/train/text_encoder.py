"""Train the text encoder of `kinora-tiny` to know what every word is about.

    python -m kinora.pipelines.tiny.train.text_encoder --out runs/text --minutes 4 --device cpu

A colour and the shape after it name one object of a caption. From the states of these two words,
linear heads tell that object's shape, colour, motion and side of the frame; from the end mark, the
background. The heads are thrown away. Trained together with the denoiser instead, the encoder did
not learn in 12 minutes on an H200 which of two objects an attribute belongs to.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from ...world.grammar import parse
from ...world.palette import BACKGROUNDS, COLOURS
from ...world.scene import MOTIONS, Description
from ...world.shapes import SHAPES
from ...world.split import SPLITS, sample_split
from ..architecture import TEXT_WIDTH, new_text_encoder, new_tokenizer, tokenise
from .clips import caption
from .muon import muon_and_adamw, set_learning_rate, take_step
from .session import Average, Session, arguments, settings, trapezoid

LEARNING_RATE = 2e-3
BATCH = 256
SMALL_BATCH = 16
SIDES = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
"""Where the first and the second object of a relation are."""
UNSAID = "unsaid"
ANSWERS: dict[str, tuple[str, ...]] = {
    "shape": tuple(SHAPES),
    "colour": tuple(COLOURS),
    "motion": (*MOTIONS, UNSAID),
    "side": ("left", "right", "top", "bottom", UNSAID),
    "background": (*BACKGROUNDS, UNSAID),
}
IGNORED = -100
"""Target of words that are asked nothing."""


def objects(description: Description) -> dict[str, dict[str, str]]:
    """What a description says of each object, by its colour."""
    sides = SIDES.get(description.relation or "", (UNSAID, UNSAID))
    return {
        thing.colour: {
            "shape": thing.shape,
            "colour": thing.colour,
            "motion": thing.motion or UNSAID,
            "side": side,
        }
        for thing, side in zip(description.things, sides, strict=False)
    }


def targets(
    captions: Sequence[str], tokens: torch.Tensor, tokenizer: PreTrainedTokenizerFast
) -> dict[str, torch.Tensor]:
    """For each question the number of the right answer at each token, or `IGNORED`: `[B, L]`."""
    asked = {question: torch.full(tokens.shape, IGNORED) for question in ANSWERS}
    for row, (text, ids) in enumerate(zip(captions, tokens.tolist(), strict=True)):
        description = parse(text)
        said = objects(description)
        words = [str(tokenizer.convert_ids_to_tokens(number)) for number in ids]
        for column, word in enumerate(words):
            if word in said:
                columns = [column]
                if column + 1 < len(words) and words[column + 1] in SHAPES:
                    columns.append(column + 1)
                for question, answer in said[word].items():
                    asked[question][row, columns] = ANSWERS[question].index(answer)
            elif word == tokenizer.eos_token:
                background = description.background or UNSAID
                asked["background"][row, column] = ANSWERS["background"].index(background)
    return asked


class Examination(nn.Module):
    """The heads over the encoder."""

    def __init__(self, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict(
            {question: nn.Linear(TEXT_WIDTH, len(answers)) for question, answers in ANSWERS.items()}
        )

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits `[B, L, answers]` for each question."""
        states = self.encoder(tokens, mask).last_hidden_state
        return {question: head(states) for question, head in self.heads.items()}


def draw_captions(rng: random.Random, split: str, count: int) -> list[str]:
    """Captions of videos, and but for held-out ones a quarter of images."""
    captions: list[str] = []
    for _ in range(count):
        image = split != "held-out" and rng.random() < 0.25
        description = sample_split(rng, split, things=rng.choice((1, 2, 2)), still_image=image)
        captions.append(caption(rng, description, empty=0.0))
    return captions


@torch.no_grad()
def examine(
    model: Examination, captions: Sequence[str], tokenizer: PreTrainedTokenizerFast
) -> float:
    """Share of captions for which every answer is right."""
    tokens, mask = tokenise(list(captions), tokenizer)
    device = model.encoder.device
    logits = model(tokens.to(device), mask.to(device))
    right = torch.ones(len(captions), dtype=torch.bool)
    for question, target in targets(captions, tokens, tokenizer).items():
        same = logits[question].argmax(dim=-1).cpu() == target
        right &= (same | (target == IGNORED)).all(dim=1)
    return right.float().mean().item()


def is_inner_matrix(name: str, parameter: nn.Parameter) -> bool:
    """The matrices of attention and feed-forward, which Muon trains."""
    return ".block." in name and parameter.ndim == 2 and "relative_attention_bias" not in name


def main(argv: list[str] | None = None) -> None:
    options = arguments("Train the text encoder of kinora-tiny.", LEARNING_RATE).parse_args(argv)
    torch.manual_seed(options.seed)
    tokenizer = new_tokenizer()
    encoder = new_text_encoder(tokenizer)
    if options.init:
        encoder = UMT5EncoderModel.from_pretrained(options.init)
    model = Examination(encoder).to(options.device)
    optimizers = muon_and_adamw(model, is_inner_matrix, options.learning_rate)
    average = Average(model)
    stateful: dict[str, Any] = {"model": model, "average": average}
    stateful |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}
    batch = SMALL_BATCH if options.small else BATCH
    must_agree = settings(options, batch=batch)
    log_steps = 5 if options.small else 50
    session = Session(options.out, options.minutes, stateful, must_agree, log_steps=log_steps)
    for progress in session:
        rng = random.Random(f"{options.seed}/{session.step}")
        captions = draw_captions(rng, "train", batch)
        tokens, mask = tokenise(captions, tokenizer)
        set_learning_rate(optimizers, options.learning_rate * trapezoid(progress))
        logits = model(tokens.to(options.device), mask.to(options.device))
        losses = {
            question: F.cross_entropy(
                logits[question].mT, target.to(options.device), ignore_index=IGNORED
            )
            for question, target in targets(captions, tokens, tokenizer).items()
        }
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        take_step(optimizers)
        average.update()
        session.log(losses)
    average.copy_to_source()
    rng = random.Random("examination")
    count = 64 if options.small else 2000
    session.write(
        right={
            split: round(examine(model, draw_captions(rng, split, count), tokenizer), 4)
            for split in SPLITS
        }
    )
    model.encoder.save_pretrained(options.out / "text_encoder")


if __name__ == "__main__":
    main()
