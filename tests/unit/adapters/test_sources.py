"""What people write for an adapter's source: one record for every spelling, else one clear refusal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gesso.adapters.sources import Source, parse
from gesso.errors import RequestError

KINDS: dict[str, tuple[str, ...]] = {
    "owner/repo": ("owner/repo", "hf://owner/repo", "huggingface.co/owner/repo/", "https://hf.co/owner/repo"),
    "owner/repo@v1/a b.safetensors": (
        "owner/repo@v1/a b.safetensors",
        "huggingface.co/owner/repo/resolve/v1/a%20b.safetensors?download=true",
        "https://huggingface.co/owner/repo/blob/v1/a%20b.safetensors",
    ),
    "owner/repo/sub/a.safetensors": ("huggingface.co/owner/repo/sub/a.safetensors", "hf:owner/repo/sub/a.safetensors"),
    "owner/repo@refs/pr/1/a.safetensors": (
        "https://huggingface.co/owner/repo/resolve/refs%2Fpr%2F1/a.safetensors",
        "owner/repo@refs/pr/1/a.safetensors",
    ),
    "owner/repo@my%2Fbranch": ("huggingface.co/owner/repo/tree/my%2Fbranch", "owner/repo@my%2Fbranch"),
    "civitai:12": ("civitai.com/models/12/a-name", "https://civitai.red/models/12", "urn:air:sdxl:lora:civitai:12"),
    "civitai:12@34": (
        "civitai.com/models/12?modelVersionId=34",
        "https://www.civitai.com/models/12/name?modelVersionId=34&token=secret",
        "urn:air:flux1:lora:civitai:12@34.safetensors",
        "urn:air:lora:civitai:12@34",
        "civitai:12@34",
    ),
    "civitai:@34": ("https://civitai.com/api/download/models/34?type=Model&format=SafeTensor", "civitai:@34"),
    "replicate:owner/model": ("replicate.com/owner/model", "https://replicate.com/owner/model/"),
    "replicate:owner/model@abc1": ("replicate.com/owner/model/versions/abc1", "replicate.com/owner/model/abc1"),
    "https://host/a.safetensors": ("https://host/a.safetensors", "https://host/a.safetensors?"),
    "https://host/a.tar#in/b.safetensors": ("https://host/a.tar#in/b.safetensors",),
    "https://replicate.delivery/x/trained.tar": ("https://replicate.delivery/x/trained.tar",),
    "/a/b.safetensors": ("/a/b.safetensors", "file:///a/b.safetensors", "file:/a/b.safetensors"),
    "b.safetensors": ("b.safetensors", "./b.safetensors"),
    "a/b.safetensors": ("a/b.safetensors",),
    "style[v1].safetensors": ("style[v1].safetensors", "./style[v1].safetensors"),
    "[new/style].Safetensors": ("[new/style].Safetensors",),
    "a b#1.safetensors": ("a b#1.safetensors",),
}


@pytest.mark.parametrize("shown", list(KINDS))
def test_spellings_of_one_source_are_one_source(shown: str) -> None:
    found = {parse(text) for text in KINDS[shown]}
    if shown != "https://host/a.safetensors":
        assert len(found) == 1, found
    source = found.pop()
    assert source.shown == shown
    assert parse(source.shown) == source
    scaled = parse(f"{KINDS[shown][0]}::0.8")
    assert (scaled.scale, scaled.key) == (0.8, parse(KINDS[shown][0]).key)


def test_the_adapters_beside_infinite_you_have_names() -> None:
    folder = "ByteDance/InfiniteYou/supports/optional_loras"
    assert parse("infinite-you:realism::0.5").shown == f"{folder}/flux_realism_lora.safetensors"
    assert parse("infinite-you:anti-blur").shown == f"{folder}/flux_anti_blur_lora.safetensors"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a source"),
        ("word", "is not a source"),
        ("infinite-you:beauty", "write infinite-you:realism or infinite-you:anti-blur"),
        ("owner/repo/x.ckpt", "never read"),
        ("owner/repo/../x.safetensors", "is not a source"),
        ("https://huggingface.co/datasets/a/b", "the page of a model"),
        ("example.com/a/b.safetensors", "https://"),
        ("ftp://host/a.safetensors", "https"),
        ("https://user:pass@host/a.safetensors", "without an account"),
        ("https://host:99999/a", "an address"),
        ("urn:air:sdxl:checkpoint:civitai:1@2", "is not a LoRA"),
        ("civitai.com/images/3", "a model of CivitAI"),
        ("owner/repo::x", "is not a number"),
        ("owner/repo::nan", "is not a number"),
        ("owner/repo::1e9", "between -20 and 20"),
        ("~nobody-of-this-name/x", "a path"),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(text)
    assert said in str(caught.value)


def test_ambiguities_are_decided_by_rule() -> None:
    assert parse("owner/model", bare="replicate").shown == "replicate:owner/model"
    for text in ("owner/model/abc1", "owner/model/versions/abc1", "owner/model:abc1", "replicate:owner/model/abc1"):
        assert parse(text, bare="replicate").shown == "replicate:owner/model@abc1"
    assert parse("owner/model/a.safetensors", bare="replicate").shown == "replicate:owner/model/a.safetensors"
    assert parse("https://[::1]/x.safetensors").scale is None
    assert parse("style[v1].safetensors::-0.5").scale == -0.5
    with pytest.raises(RequestError, match="the page of a model"):
        parse("hf.co/x.safetensors")
    assert parse("https://[::1]/x.safetensors::2").scale == 2
    with pytest.raises(RequestError, match="not to be named here"):
        parse("./a.safetensors", files=False)


def test_secrets_in_an_address_are_not_shown() -> None:
    source = parse("https://host/x.safetensors?token=secret")
    assert "secret" in source.url
    assert "secret" not in f"{source!r} {source.shown} {source.key}"
    for text in ("https://user:secret@host/x", "https://host:99999/?t=secret", "https://civitai.com/x?token=secret"):
        with pytest.raises(RequestError) as caught:
            parse(text)
        assert "secret" not in f"{caught.value} {caught.value.as_dict()}"


WORDS = (
    "owner / repo @ :: : 0.8 https:// huggingface.co civitai.com models 12 urn:air: civitai lora # tree",
    "?modelVersionId= replicate.com resolve .safetensors .. %2F % [ ] ~ file: hf: \\ é refs/pr/1 -1e5 _weights",
    "api/download/models",
)
PARTS = st.sampled_from([*" ".join(WORDS).split(" "), " ", "\n", "\0"])


@given(st.one_of(st.text(max_size=60), st.lists(PARTS, max_size=12).map("".join)))
def test_nothing_but_a_source_or_a_refusal(text: str) -> None:
    try:
        source = parse(text)
    except RequestError:
        return
    assert isinstance(source, Source)
    assert source.shown
    assert len(source.key) == 32
    assert source.scale is None or abs(source.scale) <= 20
    if source.site in ("huggingface", "civitai", "replicate"):
        assert parse(source.shown).key == source.key
