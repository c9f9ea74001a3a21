# shellcheck shell=bash
# Sourced by the entry scripts: makes .venv from requirements/dev.txt and puts the kit on PYTHONPATH.
# The packages come from wherever this machine's pip is configured to look; every file's hash is checked.
# Set by this file: TRIBRICK_ROOT (the repository), TRIBRICK_PYTHON (the Python of .venv).

TRIBRICK_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
TRIBRICK_PYTHON="${TRIBRICK_ROOT}/.venv/bin/python"
export TRIBRICK_ROOT TRIBRICK_PYTHON

bootstrap_say() { printf '[%4ds] %s\n' "$((SECONDS - bootstrap_started))" "$*" >&2; }

bootstrap_fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The first Python on the PATH that the tool chain supports.
bootstrap_find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if command -v "${name}" >/dev/null &&
            "${name}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
            command -v "${name}"
            return
        fi
    done
    return 1
}

bootstrap_apt_install() {
    command -v apt-get >/dev/null || bootstrap_fail "$1 is missing and this machine has no apt-get; install it and start again."
    ((EUID == 0)) || bootstrap_fail "$1 is missing; run this as root, or install it: apt-get install $1."
    bootstrap_say "installing the Debian package $1"
    {
        # No candidate in the package lists: they were never fetched.
        if ! apt-cache policy "$1" | grep -q 'Candidate: [^(]'; then apt-get -q update; fi
        DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$1"
    } >"${TRIBRICK_ROOT}/.lab/bootstrap.log" 2>&1 ||
        bootstrap_fail "apt-get could not install $1; see ${TRIBRICK_ROOT}/.lab/bootstrap.log."
}

bootstrap() {
    local bootstrap_started=${SECONDS} lock="${TRIBRICK_ROOT}/requirements/dev.txt" venv="${TRIBRICK_ROOT}/.venv"
    local python stamp log="${TRIBRICK_ROOT}/.lab/bootstrap.log"
    export PYTHONPATH="${TRIBRICK_ROOT}/scripts/lib" ANSIBLE_CONFIG="${TRIBRICK_ROOT}/ansible.cfg"
    export PATH="${venv}/bin:${PATH}"

    stamp="$(sha256sum <"${lock}" | cut -d' ' -f1)"
    if [[ -x ${TRIBRICK_PYTHON} && -f ${venv}/.stamp && $(<"${venv}/.stamp") == "${stamp}" ]]; then return; fi

    mkdir -p "${TRIBRICK_ROOT}/.lab"
    # Two scripts started together must not build the same environment.
    exec 9>"${TRIBRICK_ROOT}/.lab/bootstrap.lock"
    flock --wait 900 9 || bootstrap_fail "another script has been building ${venv} for 15 minutes; end it and start again."
    if [[ -x ${TRIBRICK_PYTHON} && -f ${venv}/.stamp && $(<"${venv}/.stamp") == "${stamp}" ]]; then
        exec 9>&-
        return
    fi

    if ! python="$(bootstrap_find_python)"; then
        bootstrap_apt_install python3
        python="$(bootstrap_find_python)" || bootstrap_fail "Python 3.11, 3.12 or 3.13 is needed and none was found."
    fi
    if ! "${python}" -c 'import ensurepip, venv' 2>/dev/null; then bootstrap_apt_install python3-venv; fi

    bootstrap_say "making .venv with $("${python}" --version) and installing $(grep -c '==' "${lock}") locked packages"
    rm -f "${venv}/.stamp"
    "${python}" -m venv --clear "${venv}" >"${log}" 2>&1 || bootstrap_fail "python3 -m venv failed; see ${log}."
    if ! "${TRIBRICK_PYTHON}" -m pip install --disable-pip-version-check --require-hashes \
        --requirement "${lock}" >>"${log}" 2>&1; then
        tail -n 5 "${log}" >&2
        bootstrap_fail "pip could not install the locked packages; is a Python package index configured and reachable (pip config list)? Full log: ${log}."
    fi
    printf '%s\n' "${stamp}" >"${venv}/.stamp"
    exec 9>&-
    bootstrap_say "Python tool chain ready"
}
