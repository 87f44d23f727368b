#!/usr/bin/env bash
# The command `prefect` in the environment of env.sh: infra/prefect/prefect.sh server start
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec prefect "$@"
