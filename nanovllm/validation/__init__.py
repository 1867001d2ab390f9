"""Check what a user passes, and refuse what cannot be honoured.

This package imports nothing else of nanovllm, because every other part of the engine imports it.
"""

from nanovllm.validation.checks import as_list, check_number, check_type, check_unicode
from nanovllm.validation.fields import bool_field, check_fields, number_field, unsupported
from nanovllm.validation.unsupported import accept_unsupported, check_accepted, check_options

__all__ = [
    "accept_unsupported",
    "as_list",
    "bool_field",
    "check_accepted",
    "check_fields",
    "check_number",
    "check_options",
    "check_type",
    "check_unicode",
    "number_field",
    "unsupported",
]
