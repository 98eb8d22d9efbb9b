// Both halves of genuine frp 0.34.3 in one program, which looks at its own name: frps or frpc.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/fatedier/frp/cmd/frpc/sub"
	"github.com/fatedier/frp/pkg/config"
	_ "github.com/fatedier/frp/pkg/metrics"
	"github.com/fatedier/frp/pkg/util/log"
	"github.com/fatedier/frp/pkg/util/version"
	"github.com/fatedier/frp/server"
	"github.com/fatedier/golib/crypto"
)

func main() {
	crypto.DefaultSalt = "frp"
	if filepath.Base(os.Args[0]) == "frpc" {
		sub.Execute()
		return
	}
	file, shown := flag.String("c", "frps.ini", "settings"), flag.Bool("v", false, "version")
	flag.Parse()
	if *shown {
		fmt.Println(version.Full())
	} else if err := serve(*file); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func serve(file string) error {
	text, err := config.GetRenderedConfFromFile(file)
	if err != nil {
		return err
	}
	settings, err := config.UnmarshalServerConfFromIni(text)
	if err != nil {
		return err
	}
	if err := settings.Check(); err != nil {
		return err
	}
	log.InitLog(settings.LogWay, settings.LogFile, settings.LogLevel, settings.LogMaxDays, settings.DisableLogColor)
	service, err := server.NewService(settings)
	if err != nil {
		return err
	}
	service.Run()
	return nil
}
