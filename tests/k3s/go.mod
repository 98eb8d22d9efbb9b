module pipeops.io/tests/k3s

go 1.21
