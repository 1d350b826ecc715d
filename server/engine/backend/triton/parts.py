"""Into how many parts the work of a program is dealt out where a GPU would have too few programs."""

from __future__ import annotations


def num_parts(num_programs: int, num_multiprocessors: int, most: int) -> int:
    """A power of two, such that there are about two programs for each multiprocessor. most: at least 1 is
    returned all the same."""
    wanted = 2 * num_multiprocessors // num_programs
    return 1 << max(0, min(wanted, most).bit_length() - 1)
