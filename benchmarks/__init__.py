"""This project beside its peers, and beside the machine's ceilings."""

if not __name__.startswith("protnest."):
    _message = f"import protnest.benchmarks, not {__name__}: the bare folder name belongs to other projects"
    raise ImportError(_message)
