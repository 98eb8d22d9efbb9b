module k3s

go 1.19
