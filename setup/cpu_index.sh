# For the scripts beside it. cpu_index prints the line of a requirements file that adds the index of torch's builds for
# CPUs, if that index answers within five seconds: pip would warn of it and try again for each package. Behind a proxy
# that pip alone knows, the index counts as there.
cpu_builds=https://download.pytorch.org/whl/cpu

cpu_index() {
    if "$venv/bin/python" -m pip config list 2>/dev/null | grep -q proxy || "$venv/bin/python" - "$cpu_builds" <<'EOF'
import ssl, sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(f"{sys.argv[1]}/torch/", timeout=5)
except urllib.error.HTTPError:
    pass
except OSError as error:
    sys.exit(not isinstance(getattr(error, "reason", None), ssl.SSLError))  # pip may have other certificates
EOF
    then
        echo "--extra-index-url $cpu_builds"
    fi
}
