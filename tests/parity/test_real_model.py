"""The real Gemma 3 270M in fp32: our loader and decoder against transformers' own reading of the GGUF file.

Each greedy continuation goes through transformers once, and each of its tokens must be transformers' first
choice at that place, but for near-ties: the two sum in different orders, so that their logits differ by about
1e-5, and where transformers' best logit leads by less than `NEAR_TIE` either token may come first. Such places
are printed.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers

from server import embedded_model
from server.cache_directory import cache_directory
from server.engine.backend.reference import ReferenceBackend
from server.engine.dtype import DType
from server.engine.models.loader import open_checkpoint
from server.gguf_tokenizer import tokenizer_for_gguf
from server.tokenizer import Tokenizer
from tests.parity.harness import Engine, load_model, logits_of, request

NEAR_TIE = 1e-3
NUM_TOKENS = 32
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics are:\n1.",
    "日本の首都は",
    "Die Würde des Menschen ist",
    "Q: What is 12 times 12?\nA:",
    "#include <stdio.h>\n\nint main(void) {\n",
    '{"name": "Alice", "age": 30, "city":',
    "SELECT name, COUNT(*) FROM orders",
    "La receta de la tortilla de patatas lleva",
    "Dear Sir or Madam,\n\nI am writing to",
    "In 1969, Neil Armstrong",
    "The mitochondria is the",
    "1, 1, 2, 3, 5, 8, 13,",
    "Translate to French: 'Good morning' ->",
    "Вчера вечером я",
    "## Installation\n\n```bash\npip install",
    "Roses are red,\nviolets are blue,\n",
    "To be, or not to be, that is the",
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "texts", [PROMPTS[::4], pytest.param(PROMPTS, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_greedy_tokens_equal_transformers_on_the_real_model(texts: list[str]) -> None:
    path = embedded_model.locate()
    tokenizer = Tokenizer.from_file(tokenizer_for_gguf(path, cache_directory()))
    prompts = [tokenizer.encode_prompt(text) for text in texts]
    continuations = _continuations(path, prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' GGUF reader copies read-only arrays
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    for text, prompt_ids, tokens in zip(texts, prompts, continuations, strict=True):
        assert len(tokens) == NUM_TOKENS or tokens[-1] == tokenizer.eos_id
        logits = logits_of(theirs, [*prompt_ids, *tokens])[len(prompt_ids) - 1 : -1]
        lead = logits.amax(dim=-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        for place in lead.nonzero()[:, 0].tolist():
            print(f"near-tie after {text!r}, token {place}: transformers' choice leads by {lead[place]:.1e}")
        assert lead.max() < NEAR_TIE, f"{text!r} goes on with {tokenizer.decode(tokens)!r}"


def _continuations(path: Path, prompts: list[list[int]]) -> list[list[int]]:
    checkpoint = open_checkpoint(path)
    backend = ReferenceBackend(torch.device("cpu"), DType.FLOAT32)
    model = load_model(checkpoint.config, backend, checkpoint.tensors(DType.FLOAT32, "cpu"))
    engine = Engine(model, block_size=16, num_blocks=200, max_num_batched_tokens=256)
    return engine.generate(
        request(token_ids, request_id=str(index), max_tokens=NUM_TOKENS, stop_token_ids=(1,))
        for index, token_ids in enumerate(prompts)
    )
