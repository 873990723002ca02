"""`python -m embedq_gateway`: the same as `embedq gateway`, without the command line's entry points."""

from __future__ import annotations

from embedq_gateway.command import gateway

if __name__ == "__main__":
    gateway(prog_name="embedq gateway")
