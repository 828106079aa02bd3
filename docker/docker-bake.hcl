# docker buildx bake --file docker/docker-bake.hcl        the three images of every run, from the root of the checkout
# `ptl images build` names its targets; with `--with NAME` those that only some runs need.
# Each variable is set by an environment variable of its name. `ptl images build` sets REGISTRY, TAG, VERSION and REVISION.

variable "REGISTRY" {
  default = "" # with its slash: "registry.example.com/team/"
}

variable "VERSION" {
  default = "0.1.0" # ptl.__version__; a test compares the two
}

variable "TAG" {
  default = VERSION
}

variable "REVISION" {
  default = "unknown"
}

variable "BASE_IMAGE" {
  default = "nvidia/cuda:13.0.2-base-ubuntu24.04"
}

variable "SYSTEM_PACKAGES" {
  default = "ca-certificates gcc libc6-dev libgomp1 python3 python3-dev python3-venv"
}

variable "LOCKS" {
  default = "docker/locks"
}

variable "HASHES" {
  default = "--require-hashes"
}

group "default" {
  targets = ["prune", "recover", "evaluate"]
}

# What all images have in common.
target "common" {
  context    = "."
  dockerfile = "docker/Dockerfile"
  target     = "step"
  platforms  = ["linux/amd64"]
  args = {
    BASE_IMAGE      = BASE_IMAGE
    SYSTEM_PACKAGES = SYSTEM_PACKAGES
    LOCKS           = LOCKS
    HASHES          = HASHES
    VERSION         = VERSION
    REVISION        = REVISION
  }
}

# export-gguf is not in the default group: it is evaluate's image with llama.cpp's converter, quantizer and runtime.
target "image" {
  inherits = ["common"]
  name     = step
  matrix   = { step = ["prune", "recover", "evaluate", "export-gguf"] }
  tags     = ["${REGISTRY}ptl-${step}:${TAG}"]
  args     = { STEP = step }
}

# Not in the default group: larger than the others together. It has no CPU build.
target "evaluate-vllm" {
  inherits = ["common"]
  tags     = ["${REGISTRY}ptl-evaluate-vllm:${TAG}"]
  args     = { STEP = "evaluate-vllm", PARENT = "runtime", LOCKS = "docker/locks", HASHES = "--require-hashes" }
}

# evaluate's packages, and llmcompressor in an environment of its own: twice torch. Not in the default group either.
target "export-compressed-tensors" {
  inherits = ["common"]
  tags     = ["${REGISTRY}ptl-export-compressed-tensors:${TAG}"]
  args     = { STEP = "export-compressed-tensors", LOCK = "evaluate", PARENT = "llmcompressor" }
}
