#!/bin/sh
# servers.sh ROOT HERE CHASE [more]: sets the servers up in the tree at ROOT, reachable from outside; `more` of them where
# asked.
set -eu
root=$1 here=$2 chase=$3 more=${4:-}
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
[ "$more" = more ] || exit 0
# Files whose pages no two are alike, served from the page cache.
mkdir -p "$root/srv/files"
chroot "$root" python3 - <<'PY'
import random
rng = random.Random(13)
words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(3000)]
for n in range(3000):
    with open(f"/srv/files/{n}", "w") as out:
        out.write(" ".join(rng.choices(words, k=1800)))
PY
rm "$root/etc/nginx/sites-enabled/default"
cat > "$root/etc/nginx/sites-enabled/files" <<'SITE'
server { listen 8081; root /srv/files; access_log off; }
SITE
cp "$here/Shop.java" "$root/srv/Shop.java"
chroot "$root" javac -d /srv /srv/Shop.java
cat > "$root/etc/systemd/system/shop.service" <<'UNIT'
[Service]
ExecStart=/usr/bin/java -Xmx96m -XX:+UseSerialGC -cp /srv Shop
Restart=always
[Install]
WantedBy=multi-user.target
UNIT
systemctl --quiet --root="$root" enable shop.service nginx.service
