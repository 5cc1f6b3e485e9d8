#!/bin/sh
# servers.sh ROOT HERE CHASE: sets the servers up in the tree at ROOT, reachable from outside.
set -eu
root=$1 here=$2 chase=$3
conf=$root/etc/postgresql/15/main
cat >> "$conf/postgresql.conf" <<'CONF'
listen_addresses = '*'
shared_buffers = 64MB
jit = off
ssl = off
autovacuum = off
CONF
echo 'host all all 0.0.0.0/0 trust' >> "$conf/pg_hba.conf"
mkdir -p "$root/srv"
cp "$here/app.py" "$root/srv/app.py"
cp "$here/programs.sh" "$root/srv/programs.sh"
cp "$chase" "$root/usr/local/bin/chase"
chmod 755 "$root/usr/local/bin/chase" "$root/srv/programs.sh"
cat > "$root/etc/systemd/system/app.service" <<'UNIT'
[Service]
ExecStart=/usr/bin/gunicorn --worker-class gthread --workers 1 --threads 2 --timeout 600 --bind 0.0.0.0:80 --chdir /srv app:app
Restart=always
[Install]
WantedBy=multi-user.target
UNIT
systemctl --quiet --root="$root" enable app.service
