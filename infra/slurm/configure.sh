# The configuration of SLURM on one machine, for up: `configure` writes it below `folder` and sets `port`.

configure() {
    mkdir -p "$folder"/{etc,state,log,run,dev,munge,mysql,nodes}
    chmod 755 "$folder" "$folder/munge"
    [ -s "$folder/port" ] || free_ports >"$folder/port"
    port=$(cat "$folder/port")
    [ -s "$folder/password" ] || (umask 077 && od -An -tx1 -N16 /dev/urandom | tr -d ' \n' >"$folder/password")
    password=$(cat "$folder/password")
    [ -s "$folder/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
    echo "127.0.0.1 localhost $(hostname -s) $(seq -s' ' -f 'node%g' "$nodes")" >"$folder/etc/hosts"
    (umask 077 && accounting_configuration >"$folder/etc/slurmdbd.conf")
    controller_configuration >"$folder/etc/slurm.conf"
    printf 'AutoDetect=off\nNodeName=node[1-%d] Name=gpu File=%s\n' "$nodes" "$folder/dev/nvidia[0-$((gpus - 1))]" \
        >"$folder/etc/gres.conf"
    local gpu
    for gpu in $(seq 0 $((gpus - 1))); do  # only a device will do; the number becomes CUDA_VISIBLE_DEVICES
        [ -c "$folder/dev/nvidia$gpu" ] || mknod -m 666 "$folder/dev/nvidia$gpu" c 1 3
    done
    echo "export SLURM_CONF=$folder/etc/slurm.conf" >"$folder/env.sh"
}

free_ports() {  # the first of a row of 20 that nobody listens on
    local first candidate
    while true; do
        first=$((20000 + RANDOM % 10000))
        for candidate in $(seq "$first" $((first + 19))); do
            ! (exec 3<>"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null || continue 2
        done
        echo "$first"
        return
    done
}

accounting_configuration() {
    cat <<CONF
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 1))
SlurmUser=root
PidFile=$folder/run/slurmdbd.own.pid
LogFile=$folder/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$port
StorageUser=slurm
StoragePass=$password
StorageLoc=slurm_acct_db
CommitDelay=0
CommunicationParameters=NoInAddrAny
CONF
}

controller_configuration() {
    cat <<CONF
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket
SlurmctldPort=$((port + 2))
SlurmdPort=$((port + 3))
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/nodes/%n
SlurmctldPidFile=$folder/run/slurmctld.own.pid
SlurmdPidFile=$folder/run/%n.own.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
# No cgroups; the nodes are made up. Memory is sampled, and a job over its limit is killed.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
# Quick, so that tests are.
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_min_interval=0,defer_batch,sched_interval=2
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=20
SlurmctldTimeout=20
MessageTimeout=30
KillWait=5
OverTimeLimit=0
UnkillableStepTimeout=60
MinJobAge=60
Waittime=0
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 1))
AccountingStoragePass=$folder/munge/socket
AccountingStorageTRES=gres/gpu
NodeName=node[1-$nodes] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[$((port + 4))-$((port + 3 + nodes))] CPUs=$cpus Boards=1 SocketsPerBoard=1 CoresPerSocket=$cpus ThreadsPerCore=1 RealMemory=$memory Gres=gpu:$gpus State=UNKNOWN
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP DefMemPerCPU=1000
PartitionName=main Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=requeue PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=cancel PriorityTier=1 PreemptMode=CANCEL GraceTime=10
PartitionName=high PriorityTier=10 PreemptMode=OFF
CONF
}
