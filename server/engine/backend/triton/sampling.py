"""Chooses tokens on the GPU, in operations that can be recorded: none waits, and no shape depends on a value.

The rule is that of `server.engine.sampling.sampler`, for rows that ask for temperature, top_k, top_p and min_p
alone (ADR 0006, ADR 0029). Laws:

1. A row's token is a function of its logits and parameters: no neighbour, position or batch size changes it.
2. Suppressed ids, ids that pad the vocabulary and ids of probability zero are never chosen.
3. A row without a finite maximum fails alone.
4. The logits are read once, then a few blocks of them; only a row whose truncated distribution is spread over
   more than `_SIZE` tokens is read again.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from server.engine.backend.triton.sampling_draw import draw_rows
from server.engine.backend.triton.sampling_scan import BLOCK, BLOCKS, scan_chunks
from server.engine.backend.triton.sampling_search import search_rows

_SIZE = 1024
"""Tokens that are sorted at most."""
_TILE = 4096


class DeviceSampler:
    """Chooses tokens below `vocab_size` that are not in `suppress_token_ids`."""

    def __init__(self, vocab_size: int, suppress_token_ids: tuple[int, ...], device: torch.device) -> None:
        suppressed = sorted({token for token in suppress_token_ids if token < vocab_size})
        self._suppressed = torch.tensor(suppressed, dtype=torch.int64, device=device)
        self._vocab_size = vocab_size
        self._num_chunks = triton.cdiv(vocab_size, BLOCK.value * BLOCKS.value)

    def launch(self, logits: Tensor, arrays: Mapping[str, Tensor]) -> Tensor:
        """A token for each row of logits, [S, >= vocab_size] in any floating dtype, which may be changed.

        arrays: those of `SAMPLING_ARRAYS`, [S], on the device.

        Returns int32 [S]: ids, or what `sampled_tokens` knows where there is none.
        """
        if len(self._suppressed) > 0:
            logits.index_fill_(1, self._suppressed, -torch.inf)
        num_rows, num_chunks = len(logits), self._num_chunks

        def scratch(dtype: torch.dtype, width: int) -> Tensor:
            return torch.empty((num_rows, width), dtype=dtype, device=logits.device)

        chunk_keys = scratch(torch.int32, num_chunks)
        chunk_tokens = scratch(torch.int32, num_chunks)
        chunk_masses = scratch(torch.float64, num_chunks)
        block_keys = scratch(torch.int32, num_chunks * BLOCKS.value)
        candidates = scratch(torch.int64, _SIZE)
        drawn = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
        rows = (logits, logits.stride(0), self._vocab_size)
        temperature, top_p, min_p, top_k = (arrays[name] for name in ("temperature", "top_p", "min_p", "top_k"))
        chunks = triton.next_power_of_2(num_chunks)
        scan_chunks[(num_chunks, num_rows)](
            *rows, temperature, top_p, min_p, top_k, chunk_keys, chunk_tokens, chunk_masses, block_keys
        )
        params = (temperature, top_p, min_p, arrays["uniform"], top_k)
        draw_rows[(num_rows,)](
            *rows,
            *params,
            chunk_keys,
            chunk_tokens,
            chunk_masses,
            block_keys,
            num_chunks,
            scratch(torch.int32, _SIZE),
            candidates,
            drawn,
            CHUNKS=chunks,
            SIZE=_SIZE,
            num_warps=8,
        )
        search_rows[(num_rows,)](
            *rows,
            *params,
            chunk_keys,
            num_chunks,
            candidates,
            drawn,
            CHUNKS=chunks,
            SIZE=_SIZE,
            TILE=_TILE,
            num_warps=16,
        )
        return drawn
