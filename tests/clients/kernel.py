# Runs code in the Jupyter kernel whose five ports are the last arguments, with
# Debian's jupyter_client: CODE HOST SHELL IOPUB STDIN CONTROL HEARTBEAT. Answers
# "input" where the code reads. Prints what the code prints, what became of it, the
# answer to an interrupt, and whether the kernel's heart beats.
import sys
from jupyter_client import BlockingKernelClient
code, host, *ports = sys.argv[1:]
names = ["shell_port", "iopub_port", "stdin_port", "control_port", "hb_port"]
client = BlockingKernelClient()
client.load_connection_info({
    "transport": "tcp", "ip": host, "key": "example", "signature_scheme": "hmac-sha256",
    **dict(zip(names, map(int, ports), strict=True)),
})
client.start_channels()
client.wait_for_ready(timeout=20)
read = lambda message: client.input("input")
answer = client.execute_interactive(code, allow_stdin=True, timeout=20, stdin_hook=read)
print(answer["content"]["status"])
client.control_channel.send(client.session.msg("interrupt_request"))
print(client.get_control_msg(timeout=20)["msg_type"])
print(client.is_alive())
