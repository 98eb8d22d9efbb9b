module peer

go 1.24

require (
	github.com/golang/snappy v1.0.0
	github.com/hashicorp/yamux v0.1.2
)
