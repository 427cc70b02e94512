"""The demo: gradual pruning on real data, compared with one-shot pruning, with pictures and a report."""

try:
    from gmp_kernels.tools.demo.job import run
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"demo: expected {error.name} to be installed, got none; run: pip install 'gmp-kernels[demo]'", name=error.name
    ) from None

__all__ = ["run"]
