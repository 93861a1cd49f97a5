"""What PEFT's own folders say of alpha and rank, held against PEFT itself; and what is refused or told of it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gesso.adapters.formats.classification import classify
from gesso.adapters.formats.peft import CONFIG, LARGEST_CONFIG, peft_settings, read_config
from gesso.adapters.formats.reading import Adapter, read_adapter
from gesso.adapters.store import checked_file
from gesso.errors import FileError
from tests.tiny_flux import tiny_transformer

BLOCK = "transformer_blocks.0.attn"
MODULES = [f"{BLOCK}.to_q", f"{BLOCK}.to_k", f"{BLOCK}.add_q_proj", "proj_out", "single_transformer_blocks.0.proj_out"]
NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return tiny_transformer()


def saved(network: nn.Module, folder: Path, config: Any) -> nn.Module:
    """PEFT's own folder of an adapter with random weights, and the network that has it by PEFT."""
    torch.manual_seed(5)
    model = peft.get_peft_model(deepcopy(network), config)  # type: ignore[arg-type]
    model.save_pretrained(str(folder))
    return model.base_model.model  # type: ignore[return-value]


def read(path: Path, network: nn.Module) -> Adapter:
    return read_adapter(path, {"transformer": network})


def written(folder: Path, config: object, *, prefix: str = "base_model.model.", **metadata: str) -> Path:
    """One module of rank 2 in a folder, with what is said of it beside it."""
    folder.mkdir(exist_ok=True)
    weight = tiny_transformer().get_submodule("proj_out").weight
    assert isinstance(weight, torch.Tensor)
    tensors = {"lora_A.weight": torch.ones(2, weight.shape[1]), "lora_B.weight": torch.ones(weight.shape[0], 2)}
    save_file({f"{prefix}proj_out.{name}": tensor for name, tensor in tensors.items()}, folder / NAME, metadata)
    content = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / CONFIG).write_bytes(content)
    return folder / NAME


CONFIGS: dict[str, Any] = {
    "alpha": peft.LoraConfig(r=2, lora_alpha=32, target_modules=MODULES, init_lora_weights=False),
    "rsLoRA": peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=MODULES, init_lora_weights=False, alpha_pattern={"to_q": 3},
        rank_pattern={"to_k": 9},
    ),
    "patterns": peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=MODULES, init_lora_weights=False,
        rank_pattern={r"to_[qk]": 3, "to_k": 5, r"^proj_out": 4},
        alpha_pattern={"^proj_out": 7, r"transformer_blocks\.\d+\.attn\.(to_q|add_q_proj)": 5, "q_proj": 99, "o_k": 99},
    ),
    "LoHa": peft.LoHaConfig(r=3, alpha=12, target_modules=MODULES, init_weights=False, alpha_pattern={"to_q": 3}),
    "LoKr": peft.LoKrConfig(r=2, alpha=5, target_modules=MODULES, init_weights=False, rank_pattern={"to_q": 64}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("case", CONFIGS)
def test_pefts_own_folder_adds_what_it_adds_by_peft(case: str, network: nn.Module, tmp_path: Path) -> None:
    model = saved(network, tmp_path, deepcopy(CONFIGS[case]))
    adapter = read(tmp_path / NAME, network)
    found = adapter.parts["transformer"]
    assert found.keys() == {*MODULES, "single_transformer_blocks.1.proj_out"}
    (warning,) = adapter.warnings  # HunyuanVideo has modules of these names, too
    assert "which its names leave open; it is used as one for flux" in warning
    for module in found:
        layer: Any = model.get_submodule(module)
        torch.testing.assert_close(found[module].product(), layer.get_delta_weight("default"), rtol=1e-4, atol=1e-4)
        if case in ("alpha", "rsLoRA", "patterns"):
            assert found[module].scale == pytest.approx(layer.scaling["default"])


def test_a_dora_of_peft(network: nn.Module, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=8, use_dora=True, target_modules=["proj_out"], init_lora_weights=False)
    model = saved(network, tmp_path, config)
    layer: Any = model.get_submodule("single_transformer_blocks.0.proj_out")
    weight = layer.base_layer.weight.detach().clone()
    delta = read(tmp_path / NAME, network).parts["transformer"]["single_transformer_blocks.0.proj_out"]
    layer.merge()
    torch.testing.assert_close(delta.added(weight), layer.base_layer.weight - weight)


def test_what_the_file_says_itself_counts_first(network: nn.Module, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 32}
    own = json.dumps({"transformer.lora_alpha": 6})
    for name, metadata, scale in (
        ("a", {}, 16.0),
        ("b", {"lora_adapter_metadata": own}, 3.0),
        ("c", {"lora_adapter_metadata": "{"}, 16.0),
        ("d", {"format": "pt"}, 16.0),
    ):
        path = written(tmp_path / name, config, **metadata)
        assert read(path, network).parts["transformer"]["proj_out"].scale == scale
    path = written(tmp_path / "e", config)
    save_file(load_file(path) | {"base_model.model.proj_out.alpha": torch.tensor(4.0)}, path)
    assert read(path, network).parts["transformer"]["proj_out"].scale == 2.0


def test_patterns_of_diffusers_metadata_are_matched_as_peft_does(network: nn.Module, tmp_path: Path) -> None:
    own = {"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"^proj_ou.": 12, "proj_out": 4}}
    path = written(tmp_path / "a", {}, prefix="transformer.", lora_adapter_metadata=json.dumps(own))
    assert read(path, network).parts["transformer"]["proj_out"].scale == 6.0
    for bad in ("(", "(a*)*b"):
        own["transformer.alpha_pattern"] = {bad: 12}
        path = written(tmp_path / "b", {}, prefix="transformer.", lora_adapter_metadata=json.dumps(own))
        assert read(path, network).parts["transformer"]["proj_out"].scale == 1.0


def test_whose_names_take_what_lies_beside(network: nn.Module, tmp_path: Path) -> None:
    """Behind the name of a pipeline's part an alpha that is not said is the rank, as diffusers and ComfyUI have it."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 32}
    for prefix, scale in (("base_model.model.", 16.0), ("", 16.0), ("transformer.", 1.0), ("diffusion_model.", 1.0)):
        path = written(tmp_path / "a", config, prefix=prefix, ss_base_model_version="flux1")
        adapter = read(path, network)
        assert adapter.parts["transformer"]["proj_out"].scale == scale
        assert adapter.warnings == ()
        assert bool(checked_file(path).config) == classify(path).peft == (scale == 16)
    other = written(tmp_path / "b", config | {"lora_alpha": 4})
    first, second = (checked_file(path) for path in (written(tmp_path / "a", config), other))
    assert first.sha256 == second.sha256
    assert first.name != second.name


def test_an_alpha_that_nobody_says_is_told_of(network: nn.Module, tmp_path: Path) -> None:
    path = written(tmp_path / "a", {}, ss_base_model_version="flux1")
    path.with_name(CONFIG).unlink()
    adapter = read(path, network)
    assert adapter.parts["transformer"]["proj_out"].scale == 1.0
    (warning,) = adapter.warnings
    assert warning.startswith(f"{NAME} has PEFT's names, and no adapter_config.json says its alpha: it counts as the")
    path = written(tmp_path / "b", {}, prefix="", ss_base_model_version="flux1")
    path.with_name(CONFIG).unlink()
    assert read(path, network).warnings == ()


BROKEN: dict[str, tuple[object, str]] = {
    "no JSON": (b"{", "is no JSON"),
    "deep": (b"[" * 100_000, "is no JSON"),
    "empty": (b"", "is empty, or larger"),
    "large": (b" " * (LARGEST_CONFIG + 1), "is empty, or larger"),
    "list": ([], "is no object of JSON"),
    "type": ({"peft_type": "ADALORA"}, 'peft_type "ADALORA", which is not one of LORA, LOHA, LOKR'),
    "type's type": ({"peft_type": []}, "peft_type [], which is not one of"),
    "rank": ({"r": 0}, "r 0, which is not a whole number from 1 on"),
    "alpha": ({"r": 2, "lora_alpha": "8"}, 'lora_alpha "8", which is not a finite number'),
    "infinity": (b'{"r": 2, "lora_alpha": Infinity}', "lora_alpha Infinity, which is not a finite number"),
    "large alpha": (b'{"r": 2, "lora_alpha": 1' + b"0" * 400 + b"}", "lora_alpha 1000"),
    "root": ({"r": 2, "use_rslora": "no"}, 'use_rslora "no", which is not true or false'),
    "patterns": ({"r": 2, "alpha_pattern": [1]}, "alpha_pattern [1], which is not an object of names and numbers"),
    "value": ({"r": 2, "rank_pattern": {"to_q": 1.5}}, 'rank_pattern of "to_q" 1.5, which is not a whole number'),
    "expression": ({"r": 2, "alpha_pattern": {"(": 1}}, 'alpha_pattern "(", which is not a name of modules'),
    "endless": ({"r": 2, "alpha_pattern": {"(.*a)*b": 1}}, 'alpha_pattern "(.*a)*b", which is not a name of modules'),
    "endless choices": ({"r": 2, "alpha_pattern": {"(a|a)" * 30: 1}}, "which is not a name of modules"),
    "other weights": (
        {"r": 4},
        "is of other weights: proj_out is lora of rank 4 by it, and lora of rank 2 in the file",
    ),
    "other kind": ({"peft_type": "LOHA", "r": 2}, "proj_out is loha of rank 2 by it, and lora of rank 2 in the file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_configuration_is_one_line(case: str, network: nn.Module, tmp_path: Path) -> None:
    config, said = BROKEN[case]
    with pytest.raises(FileError) as caught:
        read(written(tmp_path / "a", config), network)
    message = str(caught.value)
    assert said in message
    assert f"{NAME}: {CONFIG} beside it " in message and "\n" not in message and message.endswith(f"{CONFIG} away")


def test_what_is_not_said_is_pefts_default(tmp_path: Path) -> None:
    plain = peft.LoraConfig()
    found = read_config(written(tmp_path / "a", {"rank_pattern": None, "use_rslora": None}))
    assert found is not None
    assert (found.rank, found.alpha, found.kind, found.root) == (plain.r, plain.lora_alpha, "lora", False)


@pytest.mark.parametrize(
    "pattern", [r"(\w+)+!", r"(?#[)(\w+)+!(?#])", r"(?x:(\w+) +)!", r"(?=a)b", "a b", "x" * 501, r"[\w.]+[\w.]+[\w.]+!"]
)
def test_patterns_that_could_be_tried_for_ever_are_refused(pattern: str, tmp_path: Path) -> None:
    """Those of strangers hold up everybody; in a file's metadata the others beside one still count."""
    path = written(tmp_path, {"r": 2, "lora_alpha": 32, "alpha_pattern": {pattern: 4}})
    with pytest.raises(FileError, match="a plain regular expression"):
        read_config(path)
    found = peft_settings(
        {"lora_adapter_metadata": json.dumps({"lora_alpha": 16, "alpha_pattern": {"to_q": 4, pattern: 2, "to_k": 1}})}
    )
    assert [found.scale(f"attn.{name}", 8, "lora") for name in ("to_q", "to_k", "to_v")] == [0.5, 0.125, 2.0]


def test_an_alpha_for_every_module_is_read_at_once() -> None:
    """Each pattern is compiled once, not again for every module or pattern."""
    names = [f"blocks.{number}.to_q" for number in range(2000)]
    found = peft_settings(
        {"lora_adapter_metadata": json.dumps({"alpha_pattern": {name: 8 * place for place, name in enumerate(names)}})}
    )
    for place in (0, 1, 1999):
        assert found.scale(names[place], 8, "lora") == place
    assert len(found._parts) == 1
