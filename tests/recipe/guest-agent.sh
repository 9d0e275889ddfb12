# The command agent of a test's guest, on its serial port. One line in: `run ID BASE64-OF-COMMAND` (long commands come
# as `part BASE64` lines before it). Out: `@@ringside begin ID`, the output in base64, `@@ringside end ID STATUS`.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run HOME=/root LANG=C.UTF-8
exec </dev/ttyS0 >/dev/ttyS0 2>&1
# From here on only a dying kernel speaks between the agent's lines; the rest is kept for dmesg.
dmesg -n 1 2>/dev/null || echo 1 >/proc/sys/kernel/printk
stty raw -echo 2>/dev/null || busybox stty raw -echo
ip link set lo up
echo "@@ringside ready"
parts=
while IFS=' ' read -r verb first second; do
    case "$verb" in
    part)
        parts=$parts$first
        ;;
    run)
        printf %s "$parts$second" | base64 -d >/run/command
        parts=
        sh /run/command >/run/output 2>&1 </dev/null
        status=$?
        echo "@@ringside begin $first"
        base64 /run/output
        echo "@@ringside end $first $status"
        ;;
    esac
done
