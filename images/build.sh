#!/bin/sh
# Build the images; `make image` and docs/images.md explain the variables.
#
#   IMAGE           name of the runtime image (default: saev:VERSION)
#   CPU_IMAGE       name of the small one (default: IMAGE with -cpu before the tag); "none" leaves it out
#   BASE_IMAGE, CPU_BASE_IMAGE   what they stand on (defaults: in the Dockerfile)
#   BASE_DIGEST, CPU_BASE_DIGEST   sha256:…, which pins a base: a tag may name another image tomorrow
#   PUSH=1          push both
#   PIP_INDEX_URL   package index in place of PyPI; passed as a secret
#   BUILD_ARGS      further arguments of `docker build`
#   DOCKER          the client (default: docker)
set -eu
cd "$(dirname "$0")/.."

fail() { echo "make image: $*" >&2; exit 1; }

docker=${DOCKER:-docker}
export DOCKER_BUILDKIT=1
command -v "$docker" >/dev/null ||
  fail "there is no command $docker. Install Docker 20.10 or newer, or set DOCKER to its client."
problem=$("$docker" version 2>&1 >/dev/null) ||
  fail "no Docker daemon answers ($(printf '%s' "$problem" | tail -n 1)). Start it, or set DOCKER_HOST."
"$docker" build --help >/dev/null 2>&1 ||
  fail "$(command -v "$docker") cannot build with BuildKit. Install its plugin docker-buildx, or set DOCKER to a client that has it."

git_or() { git "$@" 2>/dev/null || echo unknown; }
version=$(git_or describe --tags --always --dirty)
revision=$(git_or rev-parse HEAD)
described=$(git describe --tags --long --match 'v[0-9]*' 2>/dev/null || true)
# An address with a user name, or of this machine, does not belong into an image.
source=$(git config --get remote.origin.url 2>/dev/null | grep -E '^https://[^@]+$' || true)

image=${IMAGE:-saev:$version}
case ${image##*/} in *@*) fail "IMAGE is $image; expected a name and a tag, not a digest." ;; *:*) ;; *) image=$image:$version ;; esac
cpu_image=${CPU_IMAGE:-${image%:*}-cpu:${image##*:}}

default_of() { sed -n "s/^ARG $1=//p" images/Dockerfile; }

build() { # flavour image base digest
  case $1 in gpu) name=BASE_IMAGE ;; cpu) name=CPU_BASE_IMAGE ;; esac
  base=${3:-$(default_of $name)}
  case $4 in
    "") ;;
    sha256:*) base=${base%@*}@$4 ;;
    *) fail "the digest of $base is $4; expected sha256: and 64 hex digits." ;;
  esac
  case $base in *@*) ;; *)
    echo "make image: $base is a tag, which may change; docs/images.md says how to pin it." >&2 ;;
  esac
  # shellcheck disable=SC2086  # BUILD_ARGS is a list of words
  "$docker" build --file images/Dockerfile --tag "$2" \
    --build-arg "$name=$base" --build-arg "BASE=$base" \
    ${PIP_INDEX_URL:+--secret id=index_url,env=PIP_INDEX_URL} \
    --build-arg "FLAVOUR=$1" --build-arg "VERSION=$version" --build-arg "DESCRIBED=$described" \
    --build-arg "REVISION=$revision" --build-arg "SOURCE=$source" ${BUILD_ARGS:-} .
}

# Copy the list of an image's packages to a file, for those who audit images without pulling them.
materials() { # image
  folder=build/sbom
  mkdir -p $folder
  file=$folder/$(printf '%s' "${1##*/}" | tr ':' '-').cdx.json
  container=$("$docker" create "$1")
  "$docker" cp "$container:/usr/share/doc/saev/sbom.cdx.json" "$file" >/dev/null
  "$docker" rm "$container" >/dev/null
  echo "make image: $file lists the packages of $1 (CycloneDX)." >&2
}

build gpu "$image" "${BASE_IMAGE:-}" "${BASE_DIGEST:-}"
images=$image
if [ "$cpu_image" != none ]; then
  build cpu "$cpu_image" "${CPU_BASE_IMAGE:-}" "${CPU_BASE_DIGEST:-}"
  images="$image $cpu_image"
fi

for name in $images; do
  materials "$name"
  if [ "${PUSH:-0}" = 1 ]; then "$docker" push --quiet "$name" >/dev/null; fi
  # A digest, by which a cluster finds exactly this image, is known after the push.
  "$docker" inspect --format '{{.Size}} {{.Id}} {{range .RepoDigests}}{{.}} {{end}}' "$name" |
    { read -r size id digest _; echo "$name  $((size / 1000000)) MB  ${digest:-$id}"; }
done
