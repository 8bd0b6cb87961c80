"""What the configurations of all LeMo models share: the `lemo` block, and how it is read and written."""

import re
from dataclasses import dataclass
from typing import Any

from .lemo_config import LemoConfig, LemoConfigError, shown


@dataclass(init=False, repr=False, eq=False, kw_only=True)
class LemoModelConfig:
    """Mixin of a stock config (before it in the bases): its fields plus the `lemo` block.

    Args:
        lemo: A `LemoConfig`, or the mapping that config.json holds. The attribute is always a `LemoConfig`, shared by all
            layers: changing it (`config.lemo.update(keep_ratio=0.3)`) takes effect at the next step.
    """

    # Any, since what comes in (a mapping, nothing) is not what stays; LemoConfig.from_dict checks it.
    lemo: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.lemo = LemoConfig.from_dict(self.lemo)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.lemo.validate_for(self.num_hidden_layers, self.hidden_size)  # type: ignore[attr-defined]
        _refuse_code_from_elsewhere(getattr(self, "auto_map", None))

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        # A stock config is one of ours with the default block; named so, it is read without a warning about its type.
        config_dict, unused = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if config_dict.get("model_type") == super().model_type:  # type: ignore[misc]
            config_dict["model_type"] = cls.model_type  # type: ignore[attr-defined]
        return config_dict, unused

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        if isinstance(output.get("lemo"), LemoConfig):
            output["lemo"] = output["lemo"].to_dict()
        return output


def _refuse_code_from_elsewhere(auto_map: Any) -> None:
    # `another/repo--file.Class` and `/a/folder/file.Class` would run, and travel on with whatever is trained from here.
    named = list(auto_map.values()) if isinstance(auto_map, dict) else [] if auto_map is None else [auto_map]
    for entry in named:
        for name in entry if isinstance(entry, list | tuple) else [entry]:
            if name is not None and not (isinstance(name, str) and re.fullmatch(r"\w+\.\w+", name)):
                raise LemoConfigError(
                    f"auto_map may name classes of files beside the config only; got {shown(name)}; take that entry out of config.json"
                )
