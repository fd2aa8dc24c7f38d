"""The policy bundle: one folder that holds everything about one policy."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from policy_models.families import Family, family
from policy_models.normalizer import Normalizer
from policy_models.program import Assets, Program
from policy_models.spec import PolicySpec
from policy_server.errors import BundleCorrupt, BundleInvalid
from policy_server.weights import FILE, StoredWeights

MANIFEST = "policy.yaml"
GRAPHS = "graphs"
TOKENIZER = "tokenizer.json"
# What the file of a graph's gradient is called after the graph.
GRADIENT_SUFFIX = ".gradient"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What `policy.yaml` says.

    Attributes:
        format: Version of the bundle format.
        name: The policy's name in every address.
        family: Which family of `policy_models` runs it.
        version: The publisher's version of this policy.
        description: One sentence for people.
        licence: SPDX identifier of the weights' licence.
        spec: What the policy needs and gives.
        config: The family's own configuration.
        tolerance: Allowed drift from the golden case by precision ("f32", "bf16"), as a fraction of the action range.
            A precision that is not named is never used.
        metadata: What websocket clients get as their first frame, exactly as written here (openpi's `reset_pose`,
            RoboArena's server configuration); if empty, a short description of the policy.
        files: SHA-256 of every other file of the bundle, by path.
        provenance: Where data and weights came from.
        results: Measured results, as tables of the publisher's choice.
    """

    __pydantic_config__ = {"extra": "forbid"}

    format: int
    name: str
    family: str
    version: str
    description: str
    licence: str
    spec: PolicySpec
    config: dict[str, Any] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked against their published digests."""

    path: Path
    manifest: Manifest
    family: Family
    config: Any
    assets: Assets

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.manifest.name

    @property
    def spec(self) -> PolicySpec:
        """What the policy needs and gives."""
        return self.manifest.spec

    def new_program(self) -> Program:
        """Return a program that has remembered nothing yet: each engine has its own."""
        return self.family.make_program(self.spec, self.config, self.assets)

    def graphs(self, variant: str = "") -> Mapping[str, Path]:
        """Return the ONNX graphs by name, of the bundle or of a variant of it; empty for a policy that has none."""
        files = sorted((self.path / GRAPHS / variant).glob("*.onnx"))
        return {path.stem: path for path in files if not path.stem.endswith(GRADIENT_SUFFIX)}

    def gradients(self) -> Mapping[str, Path]:
        """Return the gradients of graphs, in ONNX, by the names of the graphs; those that have none are left out."""
        files = sorted((self.path / GRAPHS).glob(f"*{GRADIENT_SUFFIX}.onnx"))
        return {path.stem.removesuffix(GRADIENT_SUFFIX): path for path in files}

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the digest of every other file."""
        return digest(self.path / MANIFEST)

    @property
    def weights(self) -> Path:
        """The weights, which the graphs share with engines that build the network themselves."""
        return self.path / GRAPHS / FILE

    @property
    def size_bytes(self) -> int:
        """Size of the graphs and their weights, without variants."""
        return sum(path.stat().st_size for path in (*self.graphs().values(), self.weights) if path.exists())


def load_bundle(path: Path) -> Bundle:
    """Read and check a bundle; nothing in it is ever executed.

    Raises:
        BundleInvalid: A file is missing, or does not say what it must; the message names file and entry.
        BundleCorrupt: A file differs from the published one.
    """
    manifest = _read_manifest(path / MANIFEST)
    for name, wanted in manifest.files.items():
        got = digest(_inside(path, name))
        if got != wanted:
            raise BundleCorrupt(name, got, wanted)
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name not in manifest.files and name != MANIFEST and file.suffix != ".md":
            raise BundleInvalid(f"{path.name}: {name} is not listed under 'files' in {MANIFEST}")
    stored = {n: StoredWeights(path / n) for n in manifest.files if PurePosixPath(n).name == FILE}
    try:
        policy_family = family(manifest.family)
        config: Any = TypeAdapter(policy_family.Config).validate_python(manifest.config)
        assets = Assets(
            normalizer=_read_normalizer(path, manifest),
            tokenizer=(path / TOKENIZER).read_text(encoding="utf-8") if TOKENIZER in manifest.files else None,
            weights=stored.get(f"{GRAPHS}/{FILE}", {}),
        )
        policy_family.make_program(manifest.spec, config, assets)
    except ValidationError as error:
        raise BundleInvalid(f"{path.name}/{MANIFEST}: config: {_first(error)}") from error
    except KeyError as error:
        raise BundleInvalid(f"{path.name}: {GRAPHS}/{FILE} has no tensor {error}") from error
    except ValueError as error:
        raise BundleInvalid(f"{path.name}: {error}") from error
    return Bundle(path, manifest, policy_family, config, assets)


def find_bundles(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Return the bundle folders among `paths` and directly below them; raises BundleInvalid for a path with none."""
    found: list[Path] = []
    for path in paths:
        bundles = [path] if (path / MANIFEST).exists() else sorted(p.parent for p in path.glob(f"*/{MANIFEST}"))
        if not bundles:
            raise BundleInvalid(f"{path} is no bundle and holds none: there is no {MANIFEST}")
        found += bundles
    return tuple(found)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; raises BundleInvalid if there is no such file."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleInvalid(f"{path} cannot be read: {error.strerror}") from error


def _read_manifest(path: Path) -> Manifest:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleInvalid(f"{path.parent} is no bundle: {path.name} cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BundleInvalid(f"{path} is not YAML: {error}") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        got = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise BundleInvalid(f"{path}: this server reads bundle format {FORMAT}, got {got!r}")
    try:
        return TypeAdapter(Manifest).validate_python(raw)
    except ValidationError as error:
        raise BundleInvalid(f"{path}: {_first(error)}") from error


def _read_normalizer(path: Path, manifest: Manifest) -> Normalizer | None:
    if "normalizer.json" not in manifest.files:
        return None
    try:
        return TypeAdapter(Normalizer).validate_json((path / "normalizer.json").read_bytes())
    except ValidationError as error:
        raise BundleInvalid(f"{path.name}/normalizer.json: {_first(error)}") from error


def _inside(path: Path, name: str) -> Path:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts:
        raise BundleInvalid(f"{path.name}/{MANIFEST}: file {name!r} lies outside the bundle")
    return path / pure


def _first(error: ValidationError) -> str:
    details = error.errors()[0]
    where = ".".join(map(str, details["loc"]))
    return f"{where}: {details['msg']}" + (f", got {details['input']!r}" if details["type"] != "missing" else "")
