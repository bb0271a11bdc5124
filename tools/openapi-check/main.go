// Validates an OpenAPI document: openapi-check FILE
package main

import (
	"fmt"
	"os"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
)

func main() {
	if err := check(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func check(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	document, err := libopenapi.NewDocument(text)
	if err != nil {
		return err
	}
	checker, errs := validator.NewValidator(document)
	if len(errs) > 0 {
		return fmt.Errorf("%s: %v", file, errs)
	}
	if isValid, problems := checker.ValidateDocument(); !isValid {
		return fmt.Errorf("%s: %v", file, problems)
	}
	return nil
}
