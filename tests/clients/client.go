// Asks for sessions as Go programs do. Arguments: host, port.
package main

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
)

func check(err error) {
	if err != nil {
		panic(err)
	}
}

func main() {
	address := net.JoinHostPort(os.Args[1], os.Args[2])
	for _, body := range []string{"", `{"protocol":"TCP"}`} {
		answer, err := http.Post("http://"+address+"/v1/sessions", "application/json", strings.NewReader(body))
		check(err)
		answer.Body.Close()
		fmt.Println("net/http", answer.StatusCode)
	}
	raw, err := net.Dial("tcp", address)
	check(err)
	fmt.Fprint(raw, "POST /v1/sessions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	check(raw.(*net.TCPConn).CloseWrite())
	answer, err := http.ReadResponse(bufio.NewReader(raw), nil)
	check(err)
	fmt.Println("half-closed", answer.StatusCode)
}
