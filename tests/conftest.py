"""Every test runs with shapes and types checked at run time, and with the compilation cache on."""

from jaxtyping import install_import_hook

install_import_hook("mam", "beartype.beartype")

from mam.runtime import enable_compilation_cache  # noqa: E402

enable_compilation_cache()
