"""Asks for sessions as Python programs do. Arguments: host, port."""

import http.client
import json
import socket
import sys
import urllib.request

host, port = sys.argv[1], int(sys.argv[2])
url = f"http://{host}:{port}/v1/sessions"

connection = http.client.HTTPConnection(host, port)
for _ in range(2):  # the second one over the same connection
    connection.request("POST", "/v1/sessions")
    answer = connection.getresponse()
    answer.read()
    print("http.client", answer.status)

body = json.dumps({"protocol": "TCP"}).encode()
request = urllib.request.Request(url, body, {"content-type": "application/json"})
print("urllib", urllib.request.urlopen(request).status)

raw = socket.create_connection((host, port))
raw.sendall(b"POST /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
raw.shutdown(socket.SHUT_WR)
print("half-closed", raw.makefile("rb").readline().split()[1].decode())
