"""The images: names, locks and checkers always; what needs an engine is marked `docker` and skips loudly without one.

`.ci/docker.sh run .venv/bin/pytest -m docker` starts an engine where there is none and builds the images first.
"""

import configparser
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ptl
from ptl.config import image_names
from ptl.config.run import load_config, pairs
from ptl.errors import InputError, WorkError
from ptl.local import images

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "pipelines" / "prune_tune_loop" / "configs"
LOCKS = ROOT / "docker" / "locks"
DOCKERFILE = ROOT / "docker" / "Dockerfile"
INSTALL_LOCK = ROOT / "docker" / "install-lock.sh"
DIGESTS = {name: f"sha256:{number:064x}" for number, name in enumerate(image_names.IMAGES)}
ALL_DIGESTS = DIGESTS | {name: f"sha256:{number:064x}" for number, name in enumerate(image_names.OPTIONAL, 3)}
SECTION = {"registry": "registry.example.com/team", "tag": "7", "digests": DIGESTS}
SCRIPTS = [ROOT / ".ci" / "docker.sh", ROOT / "docker" / "lock.sh", INSTALL_LOCK]


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


# ---- names


def test_name_is_registry_image_and_version():
    three = [f"ptl-{name}:{ptl.__version__}" for name in ("prune", "recover", "evaluate")]
    assert image_names.names() == three and image_names.names(optional=["evaluate-vllm"]) == [
        *three,
        f"ptl-evaluate-vllm:{ptl.__version__}",
    ]
    assert (
        image_names.image("prune", "registry.example.com:5000/team", "1.2")
        == "registry.example.com:5000/team/ptl-prune:1.2"
    )
    assert image_names.image("import-model") == image_names.image("evaluate")  # it reads the benchmarks
    assert image_names.image("report") == image_names.image("evaluate")


def test_optional_images_are_chosen_by_name():
    assert image_names.chosen([]) == []
    assert image_names.chosen(["export-gguf", "evaluate-vllm", "export-gguf"]) == ["evaluate-vllm", "export-gguf"]
    assert image_names.chosen(["export-gguf", "all"]) == list(image_names.OPTIONAL)
    choices = "evaluate-vllm, export-gguf, export-compressed-tensors, all; prune, recover, evaluate are always included"
    for name in ("gguf", "prune", ""):
        with pytest.raises(InputError, match=re.escape(f"--with: {name!r} must be one of {choices}")):
            image_names.chosen(["all", name])


def test_with_digests_every_image_is_named_by_its_own():

    config = load_config(CONFIGS / "tiny.yaml", {"images": SECTION})
    assert config.image_names()[1] == f"registry.example.com/team/ptl-recover:7@{DIGESTS['recover']}"
    assert config.images.of("report") == config.images.of("evaluate") != config.images.of("prune")
    for digests, named in (
        ({"prune": DIGESTS["prune"]}, "images.digests has none of recover, evaluate"),
        ({**DIGESTS, "recover": "sha256:12"}, "images.digests.recover: 'sha256:12'"),
    ):
        with pytest.raises(InputError, match=re.escape(named)):
            load_config(CONFIGS / "tiny.yaml", {"images.digests": digests})


def test_a_section_of_images_may_have_more_than_a_run_needs_and_must_not_have_less():
    three = {"images": SECTION}
    six = {"images": {**SECTION, "digests": ALL_DIGESTS}}
    tiny = CONFIGS / "tiny.yaml"
    assert load_config(tiny, six).image_names() == load_config(tiny, three).image_names()
    exports = {"export": [{"format": "gguf", "type": "q8_0"}, {"format": "compressed-tensors", "type": "fp8"}]}
    needed = load_config(tiny, exports | six).image_names()
    steps = (*image_names.IMAGES, *image_names.OPTIONAL[1:])
    assert needed == [image_names.image(s, "registry.example.com/team", "7", ALL_DIGESTS[s]) for s in steps]
    command = "ptl images digests --with export-gguf --with export-compressed-tensors"
    named = f"images.digests has none of export-gguf, export-compressed-tensors: take what `{command}` prints"
    with pytest.raises(InputError, match=re.escape(named)):
        load_config(tiny, exports | three)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("prune", "https://registry.example.com"), "'https://registry.example.com'"),
        (("prune", "registry.example.com/"), "'registry.example.com/'"),
        (("prune", "Registry.example.com"), "'Registry.example.com'"),
        (("prune", "", "a b"), "'a b'"),
        (("prune", "", ""), "''"),
    ],
)
def test_wrong_names_are_refused_with_the_value(arguments, named):
    with pytest.raises(InputError, match=re.escape(named)):
        image_names.image(*arguments)


def test_names_cost_no_heavy_import():
    code = (
        "import sys, ptl.local.images; print(*sorted({'torch', 'docker', 'kfp', 'mlflow', 'boto3'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == ""


def test_bake_file_has_the_same_images_and_version():
    bake = (ROOT / images.BAKE_FILE).read_text()
    assert re.search(r'variable "VERSION" \{\s+default = "([^"]+)"', bake)[1] == ptl.__version__
    assert json.loads(re.search(r"matrix\s+= \{ step = (\[.*?\]) \}", bake)[1]) == [*image_names.IMAGES, "export-gguf"]
    assert 'tags       = ["${REGISTRY}ptl-${step}:${TAG}"]' in bake
    assert re.findall(r'^\s+target += "(.*)"$', bake, re.M) == ["step"] * 3  # the Dockerfile's last stage
    assert re.findall(r"^\s+STEP += (.*)$", bake, re.M) == [
        "step",
        '"evaluate-vllm"',
        '"export-compressed-tensors"',
    ]


def test_every_image_has_a_target_of_its_name_and_may_have_a_digest_in_a_config():
    from ptl.config.run import ImageName

    bake = (ROOT / images.BAKE_FILE).read_text()
    matrix = json.loads(re.search(r"matrix\s+= \{ step = (\[.*?\]) \}", bake)[1])
    alone = [name for name in re.findall(r'^target "(.*)" \{$', bake, re.M) if name != "image"]
    assert sorted([*matrix, *alone]) == sorted([*image_names.IMAGES, *image_names.OPTIONAL])
    assert get_args(ImageName) == (*image_names.IMAGES, *image_names.OPTIONAL)
    for name in alone:
        assert f'tags       = ["${{REGISTRY}}ptl-{name}:${{TAG}}"]' in bake


@pytest.mark.slow
def test_compiled_pipeline_names_exactly_these_images(tmp_path):
    yaml = pytest.importorskip("yaml")
    pipeline = pytest.importorskip("pipelines.prune_tune_loop.pipeline")

    config = CONFIGS / "tiny.yaml"
    for overrides, wanted in (
        ({}, image_names.names()),
        (
            {"images.registry": "registry.example.com/team", "images.tag": "x"},
            image_names.names("registry.example.com/team", "x"),
        ),
        (
            {"images": SECTION},
            [image_names.image(name, "registry.example.com/team", "7", DIGESTS[name]) for name in image_names.IMAGES],
        ),
    ):
        pipeline.compile_pipeline(load_config(config, overrides), tmp_path / "pipeline.yaml")
        compiled = next(yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text()))
        executors = compiled["deploymentSpec"]["executors"]
        used = {name: executor["container"]["image"] for name, executor in executors.items()}
        assert set(used.values()) == set(wanted)
        assert used["exec-prune"] == wanted[0]
        assert {used["exec-import-model"], used["exec-evaluate"], used["exec-report"]} == {wanted[2]}


# ---- locks


@pytest.mark.parametrize("name", [*image_names.IMAGES, "export-gguf", "llmcompressor"])
def test_every_pin_is_hashed_and_no_index_is_named(name):
    text = (LOCKS / f"{name}.lock").read_text()
    assert all(count >= 1 for versions in lock(LOCKS / f"{name}.lock").values() for count in versions.values())
    assert "://" not in text
    assert "index-url" not in text


def test_locks_hold_their_own_extra_only():
    prune, recover, evaluate = (set(lock(LOCKS / f"{name}.lock")) for name in image_names.IMAGES)
    assert "trl" in recover - prune - evaluate
    assert "lm-eval" in evaluate - prune - recover
    for pins in (prune, recover, evaluate):
        assert {"kfp", "mlflow-skinny", "torch"} <= pins
        assert not {"mlflow", "pytest", "docker", "kfp-kubernetes"} & pins


def test_make_install_and_the_images_take_the_same_versions():
    tested = lock(ROOT / "constraints.txt")
    for name in (*image_names.IMAGES, "export-gguf"):
        for package, versions in lock(LOCKS / f"{name}.lock").items():
            if re.match(r"(nvidia|cuda)-|triton$", package):
                assert package not in tested  # torch pins its own
            elif package == "torch":
                (version,) = versions
                assert list(tested["torch"]) == [
                    f"{version.rsplit('.', 1)[0]}.*"
                ]  # a CPU build on the disk satisfies it
            else:
                assert set(versions) == set(tested[package]), f"{package}: run `make lock`"


def test_recover_and_evaluate_extend_prune_pin_for_pin():
    prune = lock(LOCKS / "prune.lock")
    for name in ("recover", "evaluate", "export-gguf"):
        other = lock(LOCKS / f"{name}.lock")
        assert {package: set(other[package]) for package in prune} == {
            p: set(versions) for p, versions in prune.items()
        }


@pytest.mark.parametrize(
    ("name", "file"),
    [("dev", ROOT / "constraints.txt"), *((name, LOCKS / f"{name}.lock") for name in image_names.IMAGES)],
)
def test_locks_satisfy_setup_cfg(name, file):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extra = configparser.ConfigParser()
    extra.read_dict({"extras": dict(setup["options.extras_require"])})
    wanted = (setup["options"]["install_requires"] + extra["extras"][name]).split("\n")
    pins = lock(file)
    checked = 0
    for requirement in (Requirement(line) for line in wanted if line.strip() and not line.startswith("#")):
        versions = pins.get(canonicalize_name(requirement.name), {})
        assert versions, f"{requirement} is not in {file.name}: run `make lock`"
        releases = [version.replace(".*", ".0") for version in versions]
        assert all(requirement.specifier.contains(release) for release in releases), f"{requirement}: run `make lock`"
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize("name", [*image_names.IMAGES, "llmcompressor"])
def test_cpu_lock_is_the_lock_without_cuda(name):
    full, cpu = lock(LOCKS / f"{name}.lock"), lock(LOCKS / "cpu" / f"{name}.lock")
    left_out = set(full) - set(cpu)
    assert left_out and all(re.match(r"(nvidia|cuda)-|triton$", package) for package in left_out)
    assert list(cpu.pop("torch").values()) == [0]  # the CPU build of the release is another file
    assert cpu == {package: full[package] for package in cpu}


def test_llmcompressor_has_the_steps_torch_and_a_transformers_of_its_own():
    ours, theirs = lock(LOCKS / "evaluate.lock"), lock(LOCKS / "llmcompressor.lock")
    assert theirs["torch"].keys() == ours["torch"].keys()
    (version,) = theirs["transformers"]
    assert Version(version) <= Version("5.17")
    assert "llmcompressor" in theirs and not {"llmcompressor", "auto-round"} & set(ours)


def test_vllm_lock_did_not_fall_back_to_an_old_kfp():
    pins = lock(LOCKS / "evaluate-vllm.lock")
    assert all(count >= 1 for versions in pins.values() for count in versions.values())
    (kfp,) = pins["kfp"]
    assert Version(kfp) >= Version("2.17")
    assert {"vllm", "lm-eval", "mlflow-skinny"} <= set(pins) and "mlflow" not in pins


# ---- Dockerfile and scripts


def test_every_image_ends_unprivileged_with_labels_and_the_base_has_an_exact_tag():
    text = DOCKERFILE.read_text()
    assert re.search(r"^ARG BASE_IMAGE=nvidia/cuda:13\.\d+\.\d+-base-ubuntu24\.04$", text, re.M)
    step = text.partition("FROM ${PARENT} AS step\n")[2]  # the last stage, of all images
    assert re.findall(r"^USER (.*)$", step, re.M) == ["1000:0"] and "\nFROM" not in step
    assert 'org.opencontainers.image.title="ptl-${STEP}"' in step
    assert "org.opencontainers.image.version=" in step and "org.opencontainers.image.revision=" in step


def checker(name):
    """A checker of the `dev` extra: beside this Python, or on PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"skipped: {name} is not installed; it is in the dev extra")
    return found


def test_hadolint_passes():
    answer = subprocess.run([checker("hadolint"), DOCKERFILE], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "")


def test_shellcheck_passes():
    scripts = SCRIPTS + [path for path in (ROOT / ".ci" / "run",) if path.is_file()]
    answer = subprocess.run([checker("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (0, "")


# ---- build and push, with a stub in place of docker


@pytest.fixture
def stub_docker(tmp_path, monkeypatch):
    """A stub named docker on PATH: notes its arguments and settings; fails where FAIL says so."""
    program = tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\necho "$* | ${REGISTRY-} ${TAG-} ${BASE_IMAGE-} ${LOCKS-} ${HASHES-}" >>"$0.log"\n'
        'case "$*" in $FAIL) echo "no such thing" >&2; exit 1 ;; esac\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAIL", "nothing")
    return Path(f"{program}.log")


def test_build_passes_the_settings_to_bake(stub_docker):
    built = images.build("registry.example.com/team", "7", base_image="base:1", cpu=True)
    assert built == image_names.names("registry.example.com/team", "7")
    assert stub_docker.read_text().splitlines()[-1] == (
        "buildx bake --file docker/docker-bake.hcl --load prune recover evaluate"
        " | registry.example.com/team/ 7 base:1 docker/locks/cpu --verify-hashes"
    )


def test_optional_images_are_built_and_pushed_with_the_three(stub_docker, monkeypatch):
    optional = ["export-gguf", "export-compressed-tensors"]
    names = image_names.names("registry.example.com", "7", optional=optional)
    assert images.build("registry.example.com", "7", optional) == names
    called = stub_docker.read_text().splitlines()[-1]
    assert " --load prune recover evaluate export-gguf export-compressed-tensors |" in called
    assert images.push("registry.example.com", "7", optional) == names
    pushed = [line.split()[1] for line in stub_docker.read_text().splitlines() if line.startswith("push ")]
    assert pushed == names
    # All or none.
    monkeypatch.setenv("FAIL", "image inspect *export-gguf*")
    with pytest.raises(InputError, match=re.escape("no registry.example.com/ptl-export-gguf:7; build")):
        images.push("registry.example.com", "7", optional)
    assert len(pushed) == sum(line.startswith("push ") for line in stub_docker.read_text().splitlines())


def test_the_image_with_vllm_is_not_built_for_cpus(stub_docker):
    with pytest.raises(InputError, match="--with: evaluate-vllm has no build for CPUs"):
        images.build(optional=image_names.OPTIONAL, cpu=True)
    assert not stub_docker.exists()


def test_where_packages_come_from(stub_docker, tmp_path, monkeypatch):
    """From the command line; the index's address, which may hold a password, is in no argument."""
    from typer.testing import CliRunner

    from ptl.cli.app import app

    def build(*options):
        answer = CliRunner().invoke(app, ["images", "build", "--cpu", *map(str, options)])
        return answer.exception or stub_docker.read_text().splitlines()[-1]

    for name in ("PIP_CERT", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    assert "--set" not in build()
    ca, wheels, index = tmp_path / "ca.pem", tmp_path / "wheels", "https://user:word@index.example/simple"
    ca.write_text("PEM")
    wheels.mkdir()
    settings = f"--set *.secrets=id=ca,src={ca} --set *.secrets=id=index,env=PIP_INDEX_URL"
    called = build("--ca", ca, "--index", index, "--wheels", wheels)
    assert f"--load {settings} --set *.contexts.wheels={wheels} prune recover evaluate |" in called
    assert "word" not in called
    monkeypatch.setenv("PIP_CERT", str(ca))  # as for pip
    monkeypatch.setenv("PIP_INDEX_URL", index)
    assert f"--load {settings} prune " in build()
    for option, value in (("--ca", tmp_path / "none"), ("--wheels", ca)):
        assert build(option, value).code == 2
    assert str(build("--index", "index.example")).startswith("--index: ")


def test_every_download_of_the_build_knows_ca_and_index():
    """Each RUN that reaches out has both secrets; pip and uv read other variables."""
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    downloads = [line for line in text.splitlines() if re.match("RUN.*(--requirement |install-lock )", line)]
    assert len(downloads) == 4
    for line in downloads:
        assert "id=ca,target=/run/secrets/ca.crt" in line and "--mount=type=secret,id=index " in line
    for script, variables in (
        (downloads[0], ("PIP_CERT", "PIP_INDEX_URL")),
        (INSTALL_LOCK.read_text(), ("SSL_CERT_FILE", "UV_DEFAULT_INDEX")),
    ):
        certificate, index = variables
        assert f"export {certificate}=/run/secrets/ca.crt" in script
        assert f"{index}=$(cat /run/secrets/index)" in script and f"export {index}" in script


def test_a_lock_is_installed_with_the_builds_ca_and_index(tmp_path, monkeypatch):
    """The script of the Dockerfile's stages, with other folders, mocks of uv and python3, and a second install."""
    text = INSTALL_LOCK.read_text()
    for name in ("/run/secrets", "/opt/tools"):
        text = text.replace(name, f"{tmp_path}{name}")
    script = tmp_path / "install-lock"
    script.write_text(text)
    uv, python, secrets = tmp_path / "opt/tools/bin/uv", tmp_path / "bin/python3", tmp_path / "run/secrets"
    for program, line in (
        (uv, 'echo "${SSL_CERT_FILE-} ${UV_DEFAULT_INDEX-} $*"'),
        (python, 'mkdir -p "$4/bin" && touch "$4/bin/python" && echo venv'),
    ):
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("VIRTUAL_ENV", f"{tmp_path}/opt/ptl")  # the image's
    for name in ("SSL_CERT_FILE", "UV_DEFAULT_INDEX"):
        monkeypatch.delenv(name, raising=False)

    def install():
        command = ["sh", script, "/locks/step.lock", "--verify-hashes"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    arguments = "pip install --cache-dir /root/.cache/uv --link-mode copy --compile-bytecode --find-links /wheels"
    arguments += " --verify-hashes --requirements /locks/step.lock\n"
    assert install() == f"venv\n  {arguments}"
    secrets.mkdir(parents=True)
    (secrets / "ca.crt").write_text("PEM")
    (secrets / "index").write_text("https://index.example/simple")
    assert install() == f"{secrets}/ca.crt https://index.example/simple {arguments}"


def test_failed_build_is_a_work_error(stub_docker, monkeypatch):
    monkeypatch.setenv("FAIL", "buildx*")
    with pytest.raises(WorkError, match="exit code 1"):
        images.build()


def test_build_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "ROOT", tmp_path)
    with pytest.raises(InputError, match="checkout"):
        images.build()


def test_push_names_what_is_missing(stub_docker, monkeypatch):
    assert images.push("registry.example.com", "7") == image_names.names("registry.example.com", "7")
    assert stub_docker.read_text().splitlines()[-1].startswith("push registry.example.com/ptl-evaluate:7 ")
    monkeypatch.setenv("FAIL", "image inspect *recover*")
    with pytest.raises(InputError, match=re.escape("no registry.example.com/ptl-recover:7; build")):
        images.push("registry.example.com", "7")
    with pytest.raises(InputError, match="registry"):
        images.push("")


# As engines answer; an image pushed to two registries has two references.
KNOWS = """
case "$*" in
*/ptl-prune:7*) echo '["other.example.com/ptl-prune@PRUNE","registry.example.com/team/ptl-prune@PRUNE"]' ;;
*/ptl-recover:7*) echo '["registry.example.com/team/ptl-recover@RECOVER"]' ;;
*/ptl-evaluate:7*) echo '["registry.example.com/team/ptl-evaluate@EVALUATE"]' ;;
*/ptl-export-gguf:7*) echo '["registry.example.com/team/ptl-export-gguf@GGUF"]' ;;
image*) echo '[]' ;;
esac
"""


def test_the_digests_that_the_engine_knows_are_what_compile_takes(stub_docker):
    from typer.testing import CliRunner

    from ptl.cli.app import app

    text = KNOWS
    for name, digest in (*DIGESTS.items(), ("gguf", ALL_DIGESTS["export-gguf"])):
        text = text.replace(name.upper(), digest)
    with Path(shutil.which("docker")).open("a") as program:
        program.write(text)
    command = ["images", "digests", "--registry", "registry.example.com/team", "--tag", "7"]
    answer = CliRunner().invoke(app, [*command, "--with", "export-gguf"])
    more = {**DIGESTS, "export-gguf": ALL_DIGESTS["export-gguf"]}
    assert json.loads(answer.stdout) == {**SECTION, "digests": more}
    answer = CliRunner().invoke(app, command)
    assert json.loads(answer.stdout) == SECTION
    config = load_config(CONFIGS / "onprem.yaml", pairs("--set", ["seed=3", f"images={answer.stdout}"]))
    assert config.images.model_dump() == SECTION and config.seed == 3
    # Built, and neither pushed nor pulled.
    with pytest.raises(InputError, match=re.escape("no digest of registry.example.com/team/ptl-prune:8; push it")):
        images.digests("registry.example.com/team", "8")
    with pytest.raises(
        InputError, match=re.escape("ptl-export-compressed-tensors:7; push it first (`ptl images push --w")
    ):
        images.digests("registry.example.com/team", "7", ["export-gguf", "export-compressed-tensors"])


def test_no_engine_and_no_docker_say_what_to_do(stub_docker, monkeypatch):
    monkeypatch.setenv("FAIL", "version*")
    with pytest.raises(WorkError, match=re.escape("no engine answers (no such thing); start Docker")):
        images.missing(["x"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(WorkError, match="not on PATH"):
        images.require_engine()


# ---- the images themselves

HARDENED = [
    "--rm",
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--tmpfs=/tmp",
    "--network=none",
]
STEPS = {
    "prune": ["prune"],
    "recover": ["recover"],
    "evaluate": ["import-model", "evaluate"],
}


def docker_run(name, *command, user="12345:0", flags=HARDENED):
    image = image_names.image(name)
    return subprocess.run(
        ["docker", "run", *flags, *([f"--user={user}"] if user else []), image, *command],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.docker
@pytest.mark.parametrize("name", image_names.IMAGES)
def test_steps_run_unprivileged_on_a_read_only_root(engine, name):
    for step in STEPS[name]:
        answer = docker_run(name, "python", "-m", "ptl", step, "--help")
        assert answer.returncode == 0, answer.stderr
        assert "Usage" in answer.stdout and step in answer.stdout


@pytest.mark.docker
@pytest.mark.parametrize("name", image_names.IMAGES)
def test_image_holds_its_own_packages_and_the_example(engine, name):
    code = """
import getpass, json, os, sys
from importlib.metadata import distributions
import kfp.dsl.executor_main, mlflow, torch, ptl
def writable(folder):
    try:
        open(os.path.join(folder, "probe"), "w").close()
    except OSError:
        return False
    return True
print(json.dumps({
    "uid": os.getuid(), "user": getpass.getuser(), "version": ptl.__version__,
    "in_site": "site-packages" in ptl.__file__,
    "writable": [f for f in (".", os.environ["HOME"], "/opt/ptl", "/tmp") if writable(f)],
    "files": sorted(os.listdir("examples/tiny_reasoner")), "names": sorted({d.name for d in distributions()}),
}))
"""
    answer = docker_run(name, "python", "-c", code)
    assert answer.returncode == 0, answer.stderr
    seen = json.loads(answer.stdout)
    assert (seen["uid"], seen["user"], seen["version"], seen["in_site"]) == (12345, "ptl", ptl.__version__, True)
    assert seen["writable"] == ["/tmp"]
    assert {"checkpoint", "tiny_reasoner.yaml", "train.jsonl.gz"} <= set(seen["files"])
    packages = {canonicalize_name(package) for package in seen["names"]}
    assert {"kfp", "mlflow-skinny"} <= packages and "mlflow" not in packages
    assert ("trl" in packages) == (name == "recover")
    assert ("lm-eval" in packages) == (name == "evaluate")


@pytest.mark.docker
@pytest.mark.parametrize("name", image_names.IMAGES)
def test_image_is_labelled_and_unprivileged_by_default(engine, name):
    answer = subprocess.run(
        ["docker", "image", "inspect", image_names.image(name), "--format", "{{json .Config}}"],
        capture_output=True,
        text=True,
        check=True,
    )
    config = json.loads(answer.stdout)
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert config["User"] == "1000:0"
    assert (labels["title"], labels["version"]) == (f"ptl-{name}", ptl.__version__)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", labels["revision"])
    assert docker_run(name, "id", "-u", user=None).stdout.strip() == "1000"


@pytest.mark.docker
def test_memory_limit_ends_a_step_with_137(engine):
    flags = [*HARDENED, "--memory=64m", "--memory-swap=64m"]
    answer = docker_run("prune", "python", "-c", "bytearray(10**9)", flags=flags)
    assert answer.returncode == 137


# Folders of caches, by the variable that names each.
CACHES = ("HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
TRY_CACHES = f"""
import json, os, tempfile
from ptl.steps import mounts
warnings = mounts.load()  # as a step begins
refused = []
for folder in [*(os.environ[name] for name in {CACHES}), tempfile.gettempdir()]:
    try:
        os.makedirs(folder, exist_ok=True)
        open(os.path.join(folder, "probe"), "w").close()
    except OSError:
        refused.append(folder)
import huggingface_hub.constants
print(json.dumps({{"refused": refused, "warnings": warnings, "hub": huggingface_hub.constants.HF_HUB_CACHE}}))
"""
USERS = ("1000:0", "12345:0")


def compiled_claim(folder):
    """Where the compiled pipeline mounts storage.cache_claim for evaluate, and the variables of that step."""
    yaml = pytest.importorskip("yaml")
    pipeline = pytest.importorskip("pipelines.prune_tune_loop.pipeline")

    config = load_config(CONFIGS / "tiny.yaml", {"storage.cache_claim": "claim"})
    pipeline.compile_pipeline(config, folder / "pipeline.yaml")
    spec, platform = yaml.safe_load_all((folder / "pipeline.yaml").read_text())
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    executor = next(name for name, value in settings.items() if "evaluate" in name and value.get("pvcMount"))
    (mount,) = settings[executor]["pvcMount"]
    variables = spec["deploymentSpec"]["executors"][executor]["container"].get("env", [])
    return mount["mountPath"], [f"--env={entry['name']}={entry['value']}" for entry in variables]


def tried_caches(name, user, *flags):
    answer = docker_run(name, "python", "-c", TRY_CACHES, user=user, flags=[*HARDENED, *flags])
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.docker
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", image_names.IMAGES)
def test_every_cache_can_be_written(engine, name, user):
    seen = tried_caches(name, user)
    assert seen == {"refused": [], "warnings": [], "hub": "/tmp/cache/huggingface/hub"}


@pytest.mark.docker
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("name", image_names.IMAGES)
def test_every_cache_can_be_written_beside_a_claim(engine, name, user, tmp_path):
    """The claim as the compiled pipeline mounts it. What is above a mount point belongs to root, as in Kubernetes."""
    path, variables = compiled_claim(tmp_path)
    claim = tmp_path / "claim"
    claim.mkdir()
    claim.chmod(0o777)
    flags = [*variables, f"--mount=type=bind,src={claim},dst={path}"]
    assert tried_caches(name, user, *flags) == {"refused": [], "warnings": [], "hub": f"{path}/huggingface/hub"}
    assert (claim / "huggingface/probe").is_file()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    seen = tried_caches(name, user, *variables, f"--mount=type=bind,src={closed},dst={path}")
    assert seen["refused"] == [] and seen["hub"] == "/tmp/cache/huggingface/hub"
    assert len(seen["warnings"]) == 1 and "storage.cache_claim" in seen["warnings"][0]


@pytest.mark.docker
def test_a_claim_among_the_caches_would_take_them_from_the_step(engine, tmp_path):
    """The defect that the mount point avoids, so that the tests above cannot pass by an engine that differs."""
    (tmp_path / "claim").mkdir(mode=0o777)
    mount = f"--mount=type=bind,src={tmp_path / 'claim'},dst=/tmp/cache/huggingface"
    assert "/tmp/cache/inductor" in tried_caches("evaluate", "1000:0", mount)["refused"]
