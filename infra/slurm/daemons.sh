# Daemons by pid file, for up and down. `folder` is set by whoever reads this.
export SLURM_CONF=$folder/etc/slurm.conf  # also marks our daemons: a pid may come again

is_running() {  # NAME
    local pid
    pid=$(cat "$folder/run/$1.pid" 2>/dev/null) || return 1
    tr "\0" "\n" 2>/dev/null <"/proc/$pid/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF"
}

start() {  # NAME COMMAND...
    local name=$1
    shift
    is_running "$name" && return
    setsid "$@" </dev/null >>"$folder/log/$name.out" 2>&1 &
    echo $! >"$folder/run/$name.pid"
}

stop() {  # NAME
    local pid i
    if is_running "$1"; then
        pid=$(cat "$folder/run/$1.pid")
        kill "$pid"
        for i in $(seq 100); do
            is_running "$1" || break
            sleep 0.1
        done
        if is_running "$1"; then
            kill -9 "$pid"
            while is_running "$1"; do sleep 0.1; done
        fi
    fi
    rm -f "$folder/run/$1.pid"
}
