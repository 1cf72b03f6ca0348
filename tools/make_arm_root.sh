#!/bin/sh
# A folder with Python and onnxruntime for arm64, which qemu-user runs on an x86-64 Debian:
#   apt-get install qemu-user-static
#   tools/make_arm_root.sh arm/ && FAQ_ONNX_ARM_ROOT=arm make test-slow
# Packages come from where apt and pip get them; nothing of the system is changed.
set -eu
mkdir -p "${1:?name a folder to make}"
root=$(cd "$1" && pwd)
python=${PYTHON:-python3}
version=$("$python" -c 'import importlib.metadata as m; print(m.version("onnxruntime"))')

mkdir -p "$root/apt/state/lists/partial" "$root/apt/cache/archives/partial" "$root/debs" "$root/root"
: > "$root/apt/status"
apt() {
    apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 \
        -o Dir::State="$root/apt/state" -o Dir::State::status="$root/apt/status" \
        -o Dir::Cache="$root/apt/cache" -o APT::Sandbox::User=root "$@"
}
apt update
cd "$root/debs"
# shellcheck disable=SC2046 - one word for each package
apt download libc6 libgcc-s1 libstdc++6 libcrypt1 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 \
    libssl3 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib
for package in *.deb; do dpkg -x "$package" "$root/root"; done
"$python" -m pip install --quiet --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 --target "$root/site" "onnxruntime==$version" numpy

# onnxruntime asks these files for its processor, and crashes without them.
mkdir -p "$root/root/proc" "$root/root/sys/devices/system/cpu"
for number in 0 1; do
    printf 'processor\t: %s\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\n' "$number"
    printf 'CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd08\nCPU revision\t: 3\n\n'
done > "$root/root/proc/cpuinfo"
for name in possible present online; do
    echo 0-1 > "$root/root/sys/devices/system/cpu/$name"
done
echo "made $root"
