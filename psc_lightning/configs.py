"""Where the YAML files are: one answer for train.py, psc-train, `compress()` and a user's own Hydra application."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["config_dir", "quoted", "register"]


def config_dir() -> Path:
    """Return the folder of the YAML files: the package `psc_lightning.conf` where installed, else the checkout's `conf/`.

    Raises:
        FileNotFoundError: neither is there.

    >>> (config_dir() / "compression" / "binary.yaml").is_file()
    True
    """
    spec = importlib.util.find_spec("psc_lightning.conf")
    packaged = list(spec.submodule_search_locations or []) if spec else []
    candidates = [Path(folder) for folder in packaged] + [Path(__file__).resolve().parents[1] / "conf"]
    for folder in candidates:
        if (folder / "train.yaml").is_file():
            return folder
    raise FileNotFoundError(f"psc_lightning's configuration is in none of {[str(folder) for folder in candidates]}")


def register() -> None:
    """Make `+compression=binary +schedule=cubic +clipping=layer` known to any Hydra application.

    Call it before `hydra.main` runs; a file of the same name in the application's own folder wins. The callbacks are
    then in `psc_lightning.callbacks.presets.wanted(cfg.compression)` (a mapping to instantiate one by one) and in
    `cfg.clipping`.
    """
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class OurFolder(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("psc_lightning", f"file://{config_dir()}")

    Plugins.instance().register(OurFolder)


def quoted(value: object) -> str:
    """A value of a command's setting, so that Hydra's grammar takes any sign in it.

    >>> print(quoted("it's"))
    'it\\'s'
    """
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"
