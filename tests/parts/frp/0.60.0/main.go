// Both halves of genuine frp 0.60.0 in one program, which looks at its own name: frps or frpc.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"github.com/fatedier/frp/cmd/frpc/sub"
	"github.com/fatedier/frp/pkg/config"
	"github.com/fatedier/frp/pkg/config/v1/validation"
	_ "github.com/fatedier/frp/pkg/metrics"
	"github.com/fatedier/frp/pkg/util/log"
	"github.com/fatedier/frp/pkg/util/system"
	"github.com/fatedier/frp/pkg/util/version"
	"github.com/fatedier/frp/server"
)

func main() {
	system.EnableCompatibilityMode()
	if filepath.Base(os.Args[0]) == "frpc" {
		sub.Execute()
		return
	}
	verify := len(os.Args) > 1 && os.Args[1] == "verify"
	if verify {
		os.Args = os.Args[1:]
	}
	file, shown := flag.String("c", "frps.toml", "settings"), flag.Bool("v", false, "version")
	flag.Parse()
	if *shown {
		fmt.Println(version.Full())
	} else if err := serve(*file, verify); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func serve(file string, verify bool) error {
	settings, _, err := config.LoadServerConfig(file, true)
	if err != nil {
		return err
	}
	if _, err := validation.ValidateServerConfig(settings); err != nil || verify {
		return err
	}
	log.InitLogger(settings.Log.To, settings.Log.Level, int(settings.Log.MaxDays), settings.Log.DisablePrintColor)
	service, err := server.NewService(settings)
	if err != nil {
		return err
	}
	service.Run(context.Background())
	return nil
}
