"""What `routesae convert` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from routesae.reporting import WrongInput

CONVERTED = ("vanilla", "topk", "mlsae", "random", "jumprelu", "gated", "routesae", "crosscoder")


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """What `routesae convert` was asked for. Raises WrongInput where a value is impossible."""

    file: str
    sae: str | None = None
    """Variant; None for what keys and file name say."""
    k: int | None = None
    layer: int | None = None
    layers: str | None = None
    """Such as "4-12"; None for n//4 … 3n//4 of an LM as deep as the number of layers says."""
    routing: str | None = None
    aggregate: str | None = None
    model: str | None = None
    """The LM it was trained on, kept as where the SAE came from."""
    out: str = "saes"
    name: str | None = None
    """Folder under `out`; None for the file's name without its ending."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.sae is not None and self.sae not in CONVERTED:
            raise WrongInput(f"--sae {self.sae!r} is none of {', '.join(CONVERTED)}")
        if self.layer is not None and self.layers is not None:
            raise WrongInput(f"--layer {self.layer} is for an SAE over one layer, --layers for the others; give one")
        if Path(self.folder_name).name != self.folder_name or self.folder_name.startswith("."):
            raise WrongInput(f"--name {self.folder_name!r} must be a plain folder name, not a path and not hidden")

    @property
    def folder_name(self) -> str:
        return self.name if self.name is not None else Path(self.file).stem
