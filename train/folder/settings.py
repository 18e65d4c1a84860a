"""What `routesae convert` was asked for."""

from __future__ import annotations

from pathlib import Path

from routesae.machine.settings import DICTIONARY, MODEL, OUT, RUN, VARIANT, Settings, setting
from routesae.reporting import WrongInput

CONVERTED = ("vanilla", "topk", "mlsae", "random", "jumprelu", "gated", "routesae", "crosscoder")


class ConvertSettings(Settings):
    """Settings of one conversion. Raises WrongInput where a value is impossible."""

    file: str = setting(group=MODEL, help="The .pt to convert.", positional=True)
    sae: str | None = setting(
        None,
        group=DICTIONARY,
        help="Variant.",
        choices=CONVERTED,
        metavar="NAME",
        unset="from the keys and the file name",
    )
    k: int | None = setting(None, group=DICTIONARY, help="Active latents a token.", ge=1, unset="from the file name")
    layer: int | None = setting(
        None, group=DICTIONARY, help="Layer an SAE over one layer reads.", unset="from the file name"
    )
    layers: str | None = setting(
        None,
        group=DICTIONARY,
        help='Layers the other SAEs read, such as "4-12".',
        metavar="LIST",
        unset="n//4 to 3n//4",
    )
    routing: str | None = setting(
        None,
        choices=("hard", "soft"),
        group=VARIANT,
        help="How tokens are routed.",
        only_for="routesae",
        unset="from the file name, else hard",
    )
    aggregate: str | None = setting(
        None,
        choices=("sum", "mean"),
        group=VARIANT,
        help="What the router sees.",
        only_for="routesae",
        unset="from the file name, else sum",
    )
    model: str | None = setting(None, group=MODEL, help="Hub id of the LM it was trained on, kept in its cfg.json.")
    out: str = OUT
    name: str | None = setting(None, group=RUN, help="Folder of the SAE under --out.", unset="the file's name")
    overwrite: bool = setting(False, group=RUN, help="Replace an SAE of the same name.")

    def check(self) -> None:
        if self.layer is not None and self.layers is not None:
            raise WrongInput(f"--layer {self.layer} is for an SAE over one layer, --layers for the others; give one")
        if Path(self.folder_name).name != self.folder_name or self.folder_name.startswith("."):
            raise WrongInput(f"--name {self.folder_name!r} must be a plain folder name, not a path and not hidden")

    @property
    def folder_name(self) -> str:
        """The folder's name under `out`."""
        return self.name if self.name is not None else Path(self.file).stem


class PushSettings(Settings):
    """What `routesae push` was asked for."""

    folder: str = setting(group=RUN, help="The SAE's folder.", positional=True)
    repo: str = setting(group=RUN, help="user/name, or user/name/folder.", positional=True)
    private: bool = setting(False, group=RUN, help="Where the repository does not exist yet, make it a private one.")
    message: str | None = setting(None, group=RUN, help="Message of the commit.", unset="the folder's name")
