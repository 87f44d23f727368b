# For every shell that talks to Prefect (server, worker, command line): . infra/prefect/env.sh
# What is set already stays as it is.
_llemma=$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/../.." && pwd)
export PATH="$_llemma/.venv/bin:$PATH"
export PREFECT_HOME="${PREFECT_HOME:-$_llemma/runs/prefect}"
mkdir -p "$PREFECT_HOME"
unset _llemma

# The server, on loopback. Its database is SQLite in PREFECT_HOME, unless PREFECT_API_DATABASE_CONNECTION_URL says
# postgresql+asyncpg://USER:PASSWORD@HOST/DATABASE.
export PREFECT_SERVER_API_HOST="${PREFECT_SERVER_API_HOST:-127.0.0.1}"
export PREFECT_SERVER_API_PORT="${PREFECT_SERVER_API_PORT:-4200}"
export PREFECT_API_URL="${PREFECT_API_URL:-http://$PREFECT_SERVER_API_HOST:$PREFECT_SERVER_API_PORT/api}"
# Seconds; Prefect's own 10 are too few for SQLite's writers on a busy login node.
export PREFECT_SERVER_DATABASE_TIMEOUT="${PREFECT_SERVER_DATABASE_TIMEOUT:-120}"

# Nothing is reported to anyone.
export PREFECT_SERVER_ANALYTICS_ENABLED="${PREFECT_SERVER_ANALYTICS_ENABLED:-false}"
export DO_NOT_TRACK="${DO_NOT_TRACK:-1}"

# Our own log lines appear with the flow run.
export PREFECT_LOGGING_EXTRA_LOGGERS="${PREFECT_LOGGING_EXTRA_LOGGERS:-flows,tasks,infra,neox_core}"
export PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW="${PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW:-ignore}"
