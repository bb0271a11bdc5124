// Asks for sessions as Node.js programs do. Arguments: host, port.
const http = require("http");
const net = require("net");

const [host, port] = process.argv.slice(2);
const path = "/v1/sessions";

async function main() {
  const headers = { "content-type": "application/json" };
  const fetched = await fetch(`http://${host}:${port}${path}`, { method: "POST", headers, body: "{}" });
  console.log("fetch", fetched.status);

  await new Promise((resolve, reject) => {
    const request = http.request({ host, port, path, method: "POST" }, (answer) => {
      console.log("http.request", answer.statusCode);
      answer.resume().on("end", resolve);
    });
    request.on("error", reject).end();
  });

  await new Promise((resolve, reject) => {
    let answer = "";
    const raw = net.connect({ host, port });
    raw.on("data", (chunk) => (answer += chunk)).on("error", reject);
    raw.on("end", () => {
      console.log("half-closed", answer.split(" ")[1]);
      resolve();
    });
    raw.end("POST /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  });
}

main();
