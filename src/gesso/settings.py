"""Settings: where each value comes from, in one place.

Flag > environment (GESSO_…) > gesso.toml in the working folder > the user's file > default. The user's file is
`gesso/config.toml` in the configuration folder (XDG_CONFIG_HOME, else ~/.config). Here: the fields and their sources.
Not here: a request's own fields, which are never settings. Variables of other projects (HF_TOKEN, HF_HOME, …) keep
their meaning and are read by the libraries they belong to; ZIMAGE_ATTENTION is read here, after GESSO_ATTENTION. Tokens
are secrets: shown as stars, and never in an error.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from gesso.errors import FileError, RequestError
from gesso.memory_modes import HELP as MEMORY_HELP

PROJECT_FILE = Path("gesso.toml")


def _default_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gesso"


def user_file() -> Path:
    """Where the user's own settings lie, whether or not the file exists."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "gesso" / "config.toml"


class Settings(BaseSettings):
    """What a person or a machine sets once. Every field has a default that works."""

    model_config = SettingsConfigDict(env_prefix="GESSO_", extra="forbid", frozen=True)

    home: Path = Field(
        default_factory=_default_home, validate_default=True, description="Folder of weights, adapters and calibration."
    )
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, mps; else the best there is.")
    dtype: str | None = Field(default=None, description="float32, bfloat16, float16; else what suits model and device.")
    attention: str = Field(default="sdpa", description="Kernel of attention; gesso doctor lists them.")
    compile: bool = Field(default=False, description="Compile the networks' blocks: slow to begin, then faster.")
    model_budget: int | str | None = Field(
        default=None, description='Bytes of loaded models, such as 24GB, or "auto"; else until memory runs out.'
    )
    adapter_memory: ByteSize = Field(
        default=ByteSize(2 * 10**9), gt=0, description="Bytes of adapters kept in memory, such as 2GB."
    )
    memory: str = Field(default="auto", description=f"How models lie in memory: {MEMORY_HELP}")
    safety: Literal["off", "blur", "reject"] = Field(
        default="off", description="What becomes of pictures that the safety checker flags: off, blur or reject."
    )
    safety_model: str = Field(
        default="stable-diffusion-safety-checker", description="Safety checker: a name of the catalogue, or a folder."
    )
    safety_labels: str = Field(
        default="nsfw", min_length=1, description="Labels of a safety classifier that are unsafe, such as porn,hentai."
    )
    safety_threshold: float = Field(
        default=0.5, gt=0, lt=1, description="Share of its unsafe labels above which a safety classifier flags."
    )
    safety_frames: int = Field(
        default=8, ge=1, description="Of a video every so many frames is looked at by the safety checker, and the last."
    )
    safety_required: bool = Field(
        default=False, description="Requests may ask for more safety than the setting, never for less."
    )
    output: Path = Field(default=Path("gesso-output"), description="Folder that pictures go to.")
    offline: bool = Field(default=False, description="Never reach for the network; what is missing is an error.")
    hf_token: SecretStr | None = Field(default=None, description="Token for Hugging Face, sent to it alone.")
    modelscope_token: SecretStr | None = Field(default=None, description="Token for ModelScope, sent to it alone.")
    civitai_token: SecretStr | None = Field(default=None, description="Token for CivitAI, sent to it alone.")
    replicate_token: SecretStr | None = Field(default=None, description="Token for Replicate, sent to it alone.")
    civitai_endpoint: str = Field(default="https://civitai.com", description="Address of CivitAI, or of a mirror.")
    largest_adapter: ByteSize = Field(
        default=ByteSize(4 * 10**9), gt=0, description="Bytes that an adapter may have to be fetched, such as 4GB."
    )
    allow_private_addresses: bool = Field(
        default=False, description="Adapters may be fetched from private addresses, and by plain http from them."
    )

    @field_validator("home")
    @classmethod
    def _home_is_absolute(cls, home: Path) -> Path:
        """Paths in it are handed on as texts, and a folder and a name could be taken for an owner and a repository."""
        return home.absolute()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Puts the two files after the environment; there is no .env file and no folder of secrets."""
        project, user = (TomlConfigSettingsSource(settings_cls, toml_file=path) for path in (PROJECT_FILE, user_file()))
        return init_settings, env_settings, ZImageSource(settings_cls), project, user


class ZImageSource(PydanticBaseSettingsSource):
    """`ZIMAGE_ATTENTION`, which Z-Image's own scripts read, by its names for kernels, and by ours.

    Its `_native_flash` and `flash` have no masks, so that pictures of unequal prompts come out wrong; here each kernel
    heeds masks.
    """

    NAME = "ZIMAGE_ATTENTION"
    KERNELS: ClassVar = {
        "native": "sdpa",
        "_native_flash": "sdpa",
        "_native_math": "math",
        "flash_varlen": "flash",
        "_flash_3": "flash3",
        "_flash_varlen_3": "flash3",
    }

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """The setting's value, if it is the one."""
        found = os.environ.get(self.NAME) if field_name == "attention" else None
        return (None if found is None else self.KERNELS.get(found, found)), field_name, False

    def __call__(self) -> dict[str, Any]:
        """What this source gives."""
        names = ["attention"] if self.NAME in os.environ else []
        return {name: self.get_field_value(Settings.model_fields[name], name)[0] for name in names}


_SECRETS = ("hf_token", "modelscope_token", "civitai_token", "replicate_token")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as `gesso config` shows it."""

    name: str
    value: object
    source: str
    description: str


def load_settings(flags: Mapping[str, object] | None = None) -> Settings:
    """The settings in force.

    Args:
        flags: values given on the command line; None values count as not given.

    Raises:
        FileError: a settings file is no TOML, or cannot be read.
        RequestError: a value cannot be used, or a file names a setting that does not exist.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return Settings(**given)  # pyright: ignore[reportArgumentType]  # values are checked by pydantic
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        if name not in Settings.model_fields:
            near = get_close_matches(name, Settings.model_fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"settings: {', '.join(Settings.model_fields)}"
            raise RequestError("setting", name, f"a setting (in {_holder(name)})", hint) from error
        allowed = Settings.model_fields[name].description or ""
        value = first["input"] if name not in _SECRETS else "(not shown)"
        # Without its cause where that is a secret's: a traceback would quote the value.
        cause = error if name not in _SECRETS else None
        raise RequestError(name, value, f"usable: {allowed}", f"set in {_holder(name)}") from cause
    except tomllib.TOMLDecodeError as error:
        raise FileError(_broken_file(), f"is no TOML ({error})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(_broken_file(), f"cannot be read ({error})") from error


def explain_settings(flags: Mapping[str, object] | None = None) -> list[Setting]:
    """Every setting, its value and where it came from."""
    settings = load_settings(flags)
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    return [
        Setting(
            name=name, value=getattr(settings, name), source=_holder(name, given), description=field.description or ""
        )
        for name, field in Settings.model_fields.items()
    ]


def _holder(name: str, flags: Mapping[str, object] | None = None) -> str:
    """The first source, in order of strength, that gives this setting."""
    sources: list[tuple[str, PydanticBaseSettingsSource]] = [
        ("flag", InitSettingsSource(Settings, dict(flags or {}))),
        (f"environment GESSO_{name.upper()}", EnvSettingsSource(Settings, env_prefix="GESSO_")),
        (f"environment {ZImageSource.NAME}", ZImageSource(Settings)),
        (str(PROJECT_FILE), TomlConfigSettingsSource(Settings, toml_file=PROJECT_FILE)),
        (str(user_file()), TomlConfigSettingsSource(Settings, toml_file=user_file())),
    ]
    return next((label for label, source in sources if name in source()), "default")


def _broken_file() -> Path:
    """Which of the two files cannot be parsed; asked only after one could not."""
    for path in (PROJECT_FILE, user_file()):
        try:
            with path.open("rb") as stream:
                tomllib.load(stream)
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return path
    return user_file()
