module pipeops.test/frp

go 1.15

require (
	github.com/fatedier/frp v0.34.3
	github.com/fatedier/golib v0.1.1-0.20200901083111-1f870741e185
)
