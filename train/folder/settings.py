"""What `routesae convert` was asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from routesae.machine.settings import DICTIONARY, MODEL, OUT, RUN, Settings, setting
from routesae.reporting import WrongInput
from routesae.train.settings import RunSettings, require_plain_name

TRAINED: dict[str, Any] = dict(RunSettings.described)
CONVERTED = ("vanilla", "topk", "mlsae", "random", "jumprelu", "gated", "routesae", "crosscoder")


class ConvertSettings(Settings):
    """Settings of one conversion. Raises WrongInput where a value is impossible."""

    file: str = setting(
        ..., MODEL, "A .pt of the published code, a folder of another tool, or lens:RELEASE/ID.", positional=True
    )
    sae: str | None = setting(
        None, DICTIONARY, "Variant.", choices=CONVERTED, metavar="NAME", unset="from the keys and the file name"
    )
    k: int | None = setting(None, DICTIONARY, "Active latents a token.", ge=1, unset="from the file name")
    layer: int | None = setting(None, DICTIONARY, "Layer an SAE over one layer reads.", unset="from the file name")
    layers: str | None = setting(
        None, DICTIONARY, 'Layers the other SAEs read, such as "4-12".', metavar="LIST", unset="n//4 to 3n//4"
    )
    routing: str | None = replace(TRAINED["routing"], unset="from the file name, else hard")
    aggregate: str | None = replace(TRAINED["aggregate"], unset="from the file name, else sum")
    normalize: str = setting(
        "token",
        DICTIONARY,
        "What a .pt was trained on: states normalised per token, or raw ones (none).",
        choices=("token", "none"),
    )
    model: str | None = setting(None, MODEL, "Hub id of the LM it was trained on, kept in its cfg.json.")
    out: str = OUT
    name: str | None = setting(None, RUN, "Folder of the SAE under --out.", unset="the file's name")
    overwrite: bool = setting(False, RUN, "Replace an SAE of the same name.")

    def check(self) -> None:
        if self.layer is not None and self.layers is not None:
            raise WrongInput(f"--layer {self.layer} is for an SAE over one layer, --layers for the others; give one")
        require_plain_name(self.folder_name)

    @property
    def folder_name(self) -> str:
        """The folder's name under `out`."""
        file = Path(self.file)
        default = file.name if file.is_dir() else file.stem
        if self.file.startswith("lens:"):
            default = self.file.partition("/")[2].replace("/", "_")
        return default if self.name is None else self.name


class PushSettings(Settings):
    """What `routesae push` was asked for."""

    folder: str = setting(..., RUN, "The SAE's folder.", positional=True)
    repo: str = setting(..., RUN, "user/name, or user/name/folder.", positional=True)
    private: bool = setting(False, RUN, "Where the repository does not exist yet, make it a private one.")
    message: str | None = setting(None, RUN, "Message of the commit.", unset="the folder's name")
