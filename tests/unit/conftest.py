from tests.fixtures_tokenizers import (
    function_tokenizer,
    gemma2_tokenizer,
    gemma2_tokenizer_file,
    gemma3_tokenizer,
    gemma3_tokenizer_file,
    real_tokenizer,
    tiny_tokenizer,
)

__all__ = [
    "function_tokenizer",
    "gemma2_tokenizer",
    "gemma2_tokenizer_file",
    "gemma3_tokenizer",
    "gemma3_tokenizer_file",
    "real_tokenizer",
    "tiny_tokenizer",
]
