"""Load the libraries of the extra `import`, which a hospital's installation does not need."""

from __future__ import annotations

from typing import Any

from common.errors import ConfigError


def load_nibabel() -> Any:
    """nibabel, which reads NIfTI.

    Raises:
        ConfigError: `missing-extra`, with the command that installs it.
    """
    try:
        import nibabel
    except ImportError:
        raise _missing("nibabel") from None
    return nibabel


def load_h5py() -> Any:
    """h5py, which reads MATLAB files of version 7.3.

    Raises:
        ConfigError: `missing-extra`.
    """
    try:
        import h5py
    except ImportError:
        raise _missing("h5py") from None
    return h5py


def _missing(name: str) -> ConfigError:
    return ConfigError(
        f"this format needs {name}, which is not installed",
        code="missing-extra",
        hint="pip install 'fedqc[import]'; in a checkout: .venv/bin/pip install -e '.[import]'",
    )
