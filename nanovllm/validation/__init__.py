"""Checks of what a user passes. Every message names the parameter, the value and the limit.

This package imports nothing of nanovllm, because every other part of the engine may import it.
"""

from nanovllm.validation.fields import (
    also_takes,
    as_list,
    check_fields,
    check_number,
    check_only,
    check_options,
    check_type,
    check_unicode,
    flag,
    number,
    only,
)

__all__ = [
    "also_takes",
    "as_list",
    "check_fields",
    "check_number",
    "check_only",
    "check_options",
    "check_type",
    "check_unicode",
    "flag",
    "number",
    "only",
]
