"""The images: names, locks, and builds and pushes with a stub in place of docker."""

import configparser
import re

import one_process
import pytest
import yaml
from checkout import CONFIGS, ROOT, TINY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ptl
from ptl.config import image_names
from ptl.config.run import load_config, pairs
from ptl.errors import InputError, WorkError
from ptl.local import images

LOCKS = ROOT / "docker" / "locks"
DIGESTS = {name: f"sha256:{number:064x}" for number, name in enumerate(image_names.IMAGES)}
ALL_DIGESTS = DIGESTS | {
    name: f"sha256:{number:064x}" for number, name in enumerate(image_names.OPTIONAL, 3)
}
REGISTRY = "registry.example.com/team"
SECTION = {"registry": REGISTRY, "tag": "7", "digests": DIGESTS}
CUDA = re.compile(r"(nvidia|cuda)-|triton$")


def test_a_name_is_registry_image_version_and_digest():
    assert (
        image_names.image("import-model")
        == image_names.image("report")
        == f"ptl-evaluate:{ptl.__version__}"
    )
    with_port = image_names.image("prune", "registry.example.com:5000/team", "1.2", "sha256:1")
    assert with_port == "registry.example.com:5000/team/ptl-prune:1.2@sha256:1"
    assert image_names.chosen(["export-gguf", "evaluate-vllm", "export-gguf"]) == [
        "evaluate-vllm",
        "export-gguf",
    ]


def test_a_config_names_images_by_digests_and_needs_those_of_its_steps(tmp_path):
    from pipelines.prune_tune_loop import pipeline

    six, three = ({"images": {**SECTION, "digests": digests}} for digests in (ALL_DIGESTS, DIGESTS))
    exports = {
        "export": [
            {"format": "gguf", "type": "q8_0"},
            {"format": "compressed-tensors", "type": "fp8"},
        ]
    }
    steps = (*image_names.IMAGES, *image_names.OPTIONAL[1:])
    needed = [image_names.image(step, REGISTRY, "7", ALL_DIGESTS[step]) for step in steps]
    assert load_config(TINY, exports | six).image_names() == needed
    config = load_config(TINY, three)
    assert config.image_names() == load_config(TINY, six).image_names() == needed[:3]
    pipeline.compile_pipeline(config, tmp_path / "pipeline.yaml")
    compiled = next(yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text()))
    executors = compiled["deploymentSpec"]["executors"]
    used = {name: executor["container"]["image"] for name, executor in executors.items()}
    assert set(used.values()) == set(needed[:3])
    assert all(digest in used[f"exec-{name}"] for name, digest in DIGESTS.items())


def lock(path):
    """{package: {version: number of hashes}}; a package has two versions where Python 3.11 needs an older one."""
    pins, current = {}, None
    for line in path.read_text().splitlines():
        if pin := re.match(r"([A-Za-z0-9._-]+)==([^ ]+)", line):
            current = pins.setdefault(canonicalize_name(pin[1]), {})
            version = pin[2]
            current[version] = 0
        elif "--hash=sha256:" in line:
            current[version] += 1
    return pins


def test_every_pin_is_hashed_and_was_tested():
    locks = {path.stem: lock(path) for path in LOCKS.glob("*.lock")}
    assert {*image_names.IMAGES, "export-gguf", "llmcompressor", "evaluate-vllm"} <= locks.keys()
    for name, pins in locks.items():
        assert pins and all(
            count >= 1 for versions in pins.values() for count in versions.values()
        ), name
    prune, recover, evaluate = (locks[name].keys() for name in image_names.IMAGES)
    assert "trl" in recover - prune - evaluate and "lm-eval" in evaluate - prune - recover
    tested = lock(ROOT / "constraints.txt")
    for name in (*image_names.IMAGES, "export-gguf"):
        assert locks[name].keys() >= prune and not locks[name].keys() & {
            "mlflow",
            "pytest",
            "docker",
        }
        for package, versions in locks[name].items():
            if package == "torch":  # a CPU build on the disk satisfies it
                assert list(tested["torch"]) == [
                    f"{version.rsplit('.', 1)[0]}.*" for version in versions
                ]
            elif not CUDA.match(package):  # torch pins its own
                assert versions.keys() == tested[package].keys(), f"{package}: run `make lock`"
    # The CPU locks are those without CUDA; the CPU build of torch is another file.
    for name in (*image_names.IMAGES, "llmcompressor"):
        full, cpu = locks[name], lock(LOCKS / "cpu" / f"{name}.lock")
        assert (
            {package for package in full if CUDA.match(package)}
            == full.keys() - cpu.keys()
            != set()
        )
        assert list(cpu.pop("torch").values()) == [0] and cpu == {
            package: full[package] for package in cpu
        }


@pytest.mark.parametrize("name", ["dev", *image_names.IMAGES])
def test_locks_satisfy_setup_cfg(name):
    setup, extra = configparser.ConfigParser(), configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extra.read_dict({"extras": dict(setup["options.extras_require"])})
    lines = (setup["options"]["install_requires"] + extra["extras"][name]).split("\n")
    requirements = [
        Requirement(line) for line in lines if line.strip() and not line.startswith("#")
    ]
    pins = lock(ROOT / "constraints.txt" if name == "dev" else LOCKS / f"{name}.lock")
    assert len(requirements) >= 10
    for requirement in requirements:
        releases = [
            version.replace(".*", ".0")
            for version in pins.get(canonicalize_name(requirement.name), {})
        ]
        assert releases and all(map(requirement.specifier.contains, releases)), (
            f"{requirement}: run `make lock`"
        )


def calls(docker, verb=""):
    return [
        line
        for line in docker.with_suffix(".log").read_text().splitlines()
        if line.startswith(verb)
    ]


def test_build_passes_the_settings_to_bake(docker, tmp_path, monkeypatch):
    assert images.build(REGISTRY, "7", base_image="base:1", cpu=True) == image_names.names(
        REGISTRY, "7"
    )
    bake = "buildx bake --file docker/docker-bake.hcl --load prune recover evaluate"
    assert calls(docker, "buildx") == [
        f"{bake} | {REGISTRY}/ 7 base:1 docker/locks/cpu --verify-hashes"
    ]
    images.build(optional=["export-gguf"])
    assert calls(docker, "buildx")[-1].rstrip() == f"{bake} export-gguf |  {ptl.__version__}"
    # Where packages come from; the index's address, which may hold a password, is in no argument.
    ca, wheels, index = (
        tmp_path / "ca.pem",
        tmp_path / "wheels",
        "https://user:word@index.example/simple",
    )
    ca.write_text("PEM")
    wheels.mkdir()
    assert (
        one_process.ptl(
            "images", "build", "--cpu", "--ca", ca, "--index", index, "--wheels", wheels
        )[0]
        == 0
    )
    settings = f"--set *.secrets=id=ca,src={ca} --set *.secrets=id=index,env=PIP_INDEX_URL"
    called = calls(docker, "buildx")[-1]
    assert f"--load {settings} --set *.contexts.wheels={wheels} prune recover evaluate |" in called
    assert "word" not in called
    monkeypatch.setenv("FAIL", "buildx*")
    with pytest.raises(WorkError, match="exit code 1"):
        images.build()
    count = len(calls(docker))
    monkeypatch.setattr(images, "ROOT", tmp_path)
    with pytest.raises(InputError, match="checkout"):
        images.build()
    assert len(calls(docker)) == count  # nothing was started


def test_images_are_pushed_all_or_none(docker, monkeypatch):
    names = image_names.names("registry.example.com", "7", optional=["export-gguf"])
    assert images.push("registry.example.com", "7", ["export-gguf"]) == names
    assert [line.split()[1] for line in calls(docker, "push")] == names
    monkeypatch.setenv("FAIL", "image inspect *export-gguf*")
    with pytest.raises(
        InputError, match=re.escape("no registry.example.com/ptl-export-gguf:7; build")
    ):
        images.push("registry.example.com", "7", ["export-gguf"])
    assert len(calls(docker, "push")) == len(names)
    monkeypatch.setenv("FAIL", "version*")
    with pytest.raises(
        WorkError, match=re.escape("no engine answers (no such thing); start Docker")
    ):
        images.push("registry.example.com")


def test_the_digests_that_the_engine_knows_are_what_compile_takes(docker):
    """As engines answer; an image pushed to two registries has two references."""
    lines = [
        f"""*{asked}/ptl-{name}:7*) echo '["other/ptl-{name}@sha256:0","{known}/ptl-{name}@{digest}"]' ;;"""
        for asked, known in ((REGISTRY, REGISTRY), ("docker.io/me", "me"))
        for name, digest in DIGESTS.items()
    ]
    with docker.open("a") as program:
        program.write("\n".join(['case "$*" in', *lines, "image*) echo '[]' ;;", "esac", ""]))
    _, printed = one_process.ptl("images", "digests", "--registry", REGISTRY, "--tag", "7")
    config = load_config(CONFIGS / "onprem.yaml", pairs("--set", ["seed=3", f"images={printed}"]))
    assert config.images.model_dump() == SECTION and config.seed == 3
    assert images.digests("docker.io/me", "7")["digests"] == DIGESTS
    with pytest.raises(
        InputError, match=re.escape("export-gguf:7; push it first (`ptl images push --with export-")
    ):
        images.digests(REGISTRY, "7", ["export-gguf"])
